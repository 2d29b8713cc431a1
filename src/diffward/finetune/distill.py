"""Cross-distillation: no picture is ever shown as its own answer.

The pictures are dealt into folds. A teacher LoRA for each fold learns from all pictures but the fold's,
and stops where it does best on them; the released LoRA then learns, on each picture, what the teacher
that never saw it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.finetune.method import METHODS, Batch, Method, Run
from diffward.finetune.sampler import generator
from diffward.finetune.settings import Settings
from diffward.finetune.teachers import train_teachers

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


@METHODS.register(
    "distill",
    paper="Tran et al. 2024 (DistillMD); SELENA: Tang et al. 2022 (arXiv 2110.08324)",
    access="-",
    cost="teachers first; then 1 forward and backward and 1 no-grad forward a step",
)
class Distill(Method):
    """Learn each picture from a teacher that never saw it: L_i = ||prediction - teacher_{fold(i)}||^2."""

    options = frozenset({"privacy.folds", "privacy.teacher_targets", "privacy.teacher_lr"})

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
