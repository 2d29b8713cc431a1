"""Cross-distillation: no picture is ever shown as its own answer.

The pictures are dealt into folds. A teacher LoRA for each fold learns from all pictures but the fold's,
and stops where it does best on them; the released LoRA then learns, on each picture, what the teacher
that never saw it predicts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.files import atomic_path
from diffward.finetune.method import METHODS, Batch, Method, Run
from diffward.finetune.sampler import generator
from diffward.finetune.settings import Settings

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features
    from diffward.models.stacked import StackedAdapter

PAIRS = 8  # fixed (t, eps) draws of a teacher's validation
LOOKS = 20  # at most so many looks at a teacher's validation loss in its run
PATIENCE = 4  # looks without a better one before the teachers stop


@METHODS.register(
    "distill",
    paper="Tran et al. 2024 (DistillMD); SELENA: Tang et al. 2022 (arXiv 2110.08324)",
    access="-",
    cost="teachers first; then 1 forward and backward and 1 no-grad forward a step",
)
class Distill(Method):
    """Learn each picture from a teacher that never saw it: L_i = ||prediction - teacher_{fold(i)}||^2."""

    def precede(
        self, denoiser: Denoiser, features: Features, settings: Settings, order: list[int], folder: Path | None,
        groups: Sequence[int] | None,
    ) -> None:  # fmt: skip
        if settings.tune != "lora" or settings.text_encoder:
            raise InputError(
                "method distill trains a LoRA on the UNet; leave out --tune full and --text-encoder"
            )
        self.fold = folds_of(len(features), groups, settings.privacy.folds, settings.seed)
        self.teachers = train_teachers(denoiser, features, settings, order, self.fold, folder)

    def start(self, run: Run) -> None:
        adapter = run.denoiser.trainable_adapter
        assert adapter is not None
        self.adapter = adapter
        for number, weights in enumerate(self.teachers):
            adapter.add(f"teacher{number}", weights)

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        noisy = denoiser.noise(batch.latents, batch.t, batch.eps)
        taught = self._taught(denoiser, noisy, batch)
        prediction = denoiser.predict(noisy, batch.t, batch.conditioning)
        return ((prediction - taught) ** 2).mean(dim=(1, 2, 3))

    def facts(self) -> dict[str, str]:
        return {"ss_privacy_method": "distill"}

    @torch.no_grad()
    def _taught(self, denoiser: Denoiser, noisy: Tensor, batch: Batch) -> Tensor:
        """What the teachers predict (B, C, h, w), each on the pictures it never saw."""
        fold = self.fold[batch.rows.cpu()].to(noisy.device)
        taught = torch.empty_like(noisy)
        for number in fold.unique().tolist():
            mine = fold == number
            with self.adapter.using(f"teacher{number}"):
                taught[mine] = denoiser.predict(
                    noisy[mine], batch.t[mine], batch.conditioning[mine]
                )
        return taught


def folds_of(count: int, groups: Sequence[int] | None, folds: int, seed: int) -> Tensor:
    """The fold (n,) of each picture: groups of near-duplicates whole, sizes as even as they allow.

    Raises:
        InputError: fewer groups than folds.
    """
    group = torch.tensor(list(range(count) if groups is None else groups))
    numbers = group.unique()
    if len(numbers) < folds:
        raise InputError(
            f"method distill needs at least {folds} pictures that differ, {len(numbers)} are there; add some"
        )
    shuffled = numbers[torch.randperm(len(numbers), generator=generator(seed, 0, 1))]
    by_size = sorted(shuffled.tolist(), key=lambda g: -int((group == g).sum()))
    fold = torch.empty(count, dtype=torch.long)
    filled = [0] * folds
    for number in by_size:
        least = min(range(folds), key=filled.__getitem__)
        fold[group == number] = least
        filled[least] += int((group == number).sum())
    return fold


def train_teachers(
    denoiser: Denoiser, features: Features, settings: Settings, order: list[int], fold: Tensor,
    folder: Path | None,
) -> list[LoraWeights]:  # fmt: skip
    """One LoRA a fold, from all other pictures, as it was when it did best on the fold's."""
    from diffward.finetune.many import Job, train_many

    count = int(fold.max()) + 1
    held = [(fold == number).nonzero().flatten() for number in range(count)]
    jobs = []
    for number in range(count):
        inside = (fold != number).nonzero().flatten().tolist()
        own = replace(
            settings, seed=settings.seed + 1 + number, track="none", sample_every=0, sample_prompts=[],
            batch=settings.batch * settings.accumulate, accumulate=1,
        )  # fmt: skip
        jobs.append(Job(features.of(inside), own, [order.count(row) for row in inside]))
    longest = max(job.steps for job in jobs)
    told = f"{denoiser.unet_identity}{features.digest()}{[job.settings for job in jobs]}{fold.tolist()}{order}"
    best = _Best(denoiser, features, held, longest, folder and folder / "teachers-best.pt", told)
    if not best.done:
        train_many(
            denoiser, jobs, checkpoint=folder and folder / "teachers.pt", at_once=count, on_step=best.after_step
        )  # fmt: skip
        best.finish()
    return best.weights(jobs[0].settings.alpha)


class _Best:
    """Each teacher as it was at its best validation loss.

    What was seen is kept in a file, so that an interrupted run goes on; like every state of a training it
    tells who was a member.
    """

    def __init__(
        self, denoiser: Denoiser, features: Features, held: list[Tensor], steps: int, file: Path | None, told: str
    ) -> None:  # fmt: skip
        self.denoiser, self.features, self.held = denoiser, features, held
        self.every, self.steps, self.file = max(1, steps // LOOKS), steps, file
        self.told = hashlib.sha256(told.encode()).hexdigest()
        timesteps = denoiser.schedule.config.num_train_timesteps
        self.t = ((torch.arange(PAIRS) + 0.5) * timesteps / PAIRS).long()
        noise = torch.Generator().manual_seed(0)
        self.eps = torch.randn((PAIRS, *denoiser.latent_shape), generator=noise)
        self.losses: list[dict[int, float]] = [{} for _ in held]
        self.factors: list[dict[str, list[Tensor]]] = [{} for _ in held]
        self.done = False
        if file is not None and file.exists():
            state = torch.load(file, weights_only=True)
            if state["told"] == self.told:
                self.losses, self.factors, self.done = (
                    state["losses"],
                    state["factors"],
                    state["done"],
                )

    def after_step(self, step: int, adapter: StackedAdapter) -> bool:
        """Look, if it is time; gives whether no teacher has got better for a while."""
        if step % self.every and step < self.steps:
            return False
        # A resumed run passes looks again that it has already had.
        if step not in self.losses[adapter.labels[0]]:
            for number, loss in self._validation(adapter).items():
                found = self.losses[number]
                if not found or loss < min(found.values()):
                    k = adapter.labels.index(number)
                    self.factors[number] = {
                        name: list(layer.factors(k)) for name, layer in adapter.layers.items()
                    }
                found[step] = loss
            self._save()
        return all(_since_best(list(found.values())) >= PATIENCE for found in self.losses)

    def weights(self, alpha: float) -> list[LoraWeights]:
        from diffward.lora import LoraModule, LoraWeights

        return [
            LoraWeights({n: LoraModule.of(n, down, up, alpha) for n, (down, up) in factors.items()})
            for factors in self.factors
        ]

    def finish(self) -> None:
        self.done = True
        self._save()

    def _save(self) -> None:
        if self.file is None:
            return
        state = {
            "told": self.told,
            "losses": self.losses,
            "factors": self.factors,
            "done": self.done,
        }
        with atomic_path(self.file) as temporary:
            torch.save(state, temporary)

    @torch.no_grad()
    def _validation(self, adapter: StackedAdapter) -> dict[int, float]:
        """Mean error of each teacher that still runs, on the pictures it never saw."""
        numbers = adapter.labels[: adapter.active]
        most = max(len(self.held[number]) for number in numbers)
        size = max(1, self.denoiser.unet_batch // (PAIRS * len(numbers)))
        errors: dict[int, list[Tensor]] = {number: [] for number in numbers}
        for start in range(0, most, size):
            # Every teacher needs as many rows as the others: the last ones of a smaller fold count again,
            # and are left out of its mean.
            places = torch.arange(start, min(start + size, most))
            rows = torch.cat(
                [self.held[n][places.clamp(max=len(self.held[n]) - 1)] for n in numbers]
            ).to(self.denoiser.device)
            error = self.denoiser.errors(
                self.features.latents[rows].repeat_interleave(PAIRS, 0),
                self.t.repeat(len(rows)).to(rows.device),
                self.eps.repeat(len(rows), 1, 1, 1).to(rows.device),
                self.features.conditioning(rows).repeat_interleave(PAIRS, 0),
            ).mean(dim=(1, 2, 3))
            for number, own in zip(numbers, error.view(len(numbers), -1, PAIRS), strict=True):
                errors[number].append(own[places < len(self.held[number])])
        return {number: float(torch.cat(found).mean()) for number, found in errors.items()}


def _since_best(losses: list[float]) -> int:
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
