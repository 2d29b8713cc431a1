"""The fixed noise that every picture and both models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffward.errors import InputError

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

MIDDLE = 4  # pairs that the caption attacks use
CENTRE = 0.45  # of the schedule: t = 450 of 1,000 (CLiD, Zhai et al. 2024)


@dataclass(frozen=True)
class Pairs:
    """K fixed (t, eps) pairs: t stratified over the schedule, eps from the seed.

    Nothing about them is chosen on the pictures that are judged.
    """

    t: Tensor
    eps: Tensor
    seed: int

    @classmethod
    def draw(cls, denoiser: Denoiser, count: int, seed: int = 0) -> Pairs:
        if count < 2:
            raise InputError(f"--pairs {count}: at least 2 noise draws a picture are needed")
        steps = denoiser.schedule.config.num_train_timesteps
        t = ((torch.arange(count) + 0.5) * steps / count).long()
        generator = torch.Generator().manual_seed(seed)
        return cls(t, torch.randn((count, *denoiser.latent_shape), generator=generator), seed)

    def __len__(self) -> int:
        return len(self.t)

    @property
    def layout(self) -> Layout:
        return Layout.of(len(self), self.t.numpy())


@dataclass(frozen=True)
class Layout:
    """Which pairs which probes use: indices into the K pairs.

    `middle`: those around t = 450 of 1,000, under other captions; `early`: the less noisy half,
    for crops. Both start at an even index and are of even length, so that a bank can be halved.
    """

    timesteps: np.ndarray
    middle: np.ndarray
    early: np.ndarray

    @classmethod
    def of(cls, count: int, timesteps: np.ndarray) -> Layout:
        size = min(MIDDLE, count - count % 2)
        start = round((count * CENTRE - size / 2) / 2) * 2
        start = max(0, min(start, count - count % 2 - size))
        half = max(2, count // 2 - count // 2 % 2)
        return cls(timesteps, np.arange(start, start + size), np.arange(half))

    def halved(self) -> Layout:
        """The layout of every other pair."""
        size = len(self.timesteps) // 2
        return Layout(self.timesteps[0::2][:size], self.middle[0::2] // 2, self.early[0::2] // 2)
