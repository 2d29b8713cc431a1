"""Teachers for `distill`: LoRAs that each miss a part of the pictures and stop where they do best on it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.files import atomic_path
from diffward.finetune.settings import Settings
from diffward.models.pairs import Pairs

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features
    from diffward.models.stacked import StackedAdapter

PAIRS = 8  # fixed (t, eps) draws of a teacher's validation
LOOKS = 20  # at most so many looks at a teacher's validation loss in its run
PATIENCE = 4  # looks without a better one before the teachers stop


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
            targets=settings.privacy.teacher_targets or settings.targets,
            lr=settings.privacy.teacher_lr or settings.lr,
        )  # fmt: skip
        jobs.append(Job(features.of(inside), own, [order.count(row) for row in inside]))
    longest = max(job.steps for job in jobs)
    told = f"{denoiser.unet_identity}{features.digest()}{[job.settings for job in jobs]}{fold.tolist()}{order}"
    best = _Best(denoiser, features, held, longest, folder and folder / "teachers-best.pt", told)
    if not best.done:
        try:
            train_many(
                denoiser, jobs, checkpoint=folder and folder / "teachers.pt", at_once=count, on_step=best.after_step
            )  # fmt: skip
        except InputError as error:
            if wanted := settings.privacy.teacher_targets:
                raise InputError(f"--privacy.teacher-targets {wanted}: {error}") from error
            raise
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
        self.pairs = Pairs.draw(denoiser, PAIRS)
        self.losses: list[dict[int, float]] = [{} for _ in held]
        self.factors: list[dict[str, list[Tensor]]] = [{} for _ in held]
        self.done = False
        if file is not None and file.exists():
            state = torch.load(file, weights_only=True)
            if state["told"] == self.told:
                self.losses, self.factors = state["losses"], state["factors"]
                self.done = state["done"]

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
            rows = [self.held[n][places.clamp(max=len(self.held[n]) - 1)] for n in numbers]
            together = len(places) * len(numbers)
            found = self.pairs.errors(self.denoiser, self.features, torch.cat(rows), size=together)
            for number, own in zip(numbers, found.view(len(numbers), -1, PAIRS), strict=True):
                errors[number].append(own[places < len(self.held[number])])
        return {number: float(torch.cat(found).mean()) for number, found in errors.items()}


def _since_best(losses: list[float]) -> int:
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
