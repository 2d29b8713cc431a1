"""What a step draws: pictures, timesteps and noise, all of them functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.finetune.method import Batch

if TYPE_CHECKING:
    from diffward.finetune.settings import Settings
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


class Epochs:
    """Rows one after the other, in a fresh order each epoch: each once before any comes again."""

    def __init__(self, rows: Tensor, seed: Callable[[int], int]) -> None:
        self.rows, self.seed = rows, seed
        self._now: tuple[int, Tensor] = (-1, rows)

    def __call__(self, first: int, count: int) -> Tensor:
        """Rows (count,) from place `first` on, of all epochs in a row."""
        return torch.stack([self._row(first + i) for i in range(count)])

    def _row(self, position: int) -> Tensor:
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._now[0]:
            g = torch.Generator().manual_seed(self.seed(epoch))
            self._now = (epoch, self.rows[torch.randperm(len(self.rows), generator=g)])
        return self._now[1][place]


class Sampler:
    """Draws the batch of a step: pictures in a fresh order each epoch, uniform t, normal noise."""

    def __init__(
        self,
        denoiser: Denoiser,
        features: Features,
        settings: Settings,
        order: list[int],
        rank: int,
        world: int,
    ) -> None:
        self.denoiser, self.features, self.settings = denoiser, features, settings
        self.rank, self.world = rank, world
        self._order = Epochs(
            torch.tensor(order), lambda epoch: seed_of(settings.seed, epoch, 1 << 20, 0)
        )
        self.timesteps = denoiser.schedule.config.num_train_timesteps
        adapts_text = settings.text_encoder
        self._ids = denoiser.tokenize(features.captions) if adapts_text else None
        drops = settings.drop_caption > 0
        self._null_ids = denoiser.tokenize([""]) if drops else None
        self._null = denoiser.condition([""]) if drops and not adapts_text else None

    def __call__(self, step: int, micro: int, rows: Tensor | None = None) -> Batch:
        """The batch of a step; of the pictures `rows`, if a method draws them itself."""
        device = self.denoiser.device
        if rows is None:
            size = self.settings.batch
            first = ((step * self.settings.accumulate + micro) * self.world + self.rank) * size
            rows = self._order(first, size)
        size = len(rows)
        generator = torch.Generator().manual_seed(
            seed_of(self.settings.seed, step, micro, self.rank)
        )
        latents = self.features.latents[rows.to(device)]
        t = torch.randint(self.timesteps, (size,), generator=generator).to(device)
        eps = torch.randn(latents.shape, generator=generator).to(device)
        dropped = torch.rand(size, generator=generator) < self.settings.drop_caption
        return Batch(latents, self._conditioning(rows.to(device), dropped.to(device)), t, eps, rows)

    def _conditioning(self, rows: Tensor, dropped: Tensor) -> Tensor:
        if self._ids is None:
            conditioning = self.features.conditioning(rows)
            if self._null is not None:
                conditioning = torch.where(dropped[:, None, None], self._null, conditioning)
            return conditioning
        ids = self._ids[rows]
        if self._null_ids is not None:
            ids = torch.where(dropped[:, None], self._null_ids, ids)
        return self.denoiser.embed(ids)


def seed_of(seed: int, a: int, b: int, c: int) -> int:
    """One seed from several numbers (a splitmix-like hash: neighbours must not be alike)."""
    value = seed & (2**63 - 1)
    for part in (a, b, c):
        value = (
            value ^ (part + 0x9E3779B97F4A7C15 + (value << 6) + (value >> 2))
        ) * 0xBF58476D1CE4E5B9
        value &= 2**63 - 1
    return value


def stream_seed(seed: int, step: int, stream: int) -> int:
    """Seed of a stream of random numbers of its own for a step; `stream` tells the users of one step apart."""
    return seed_of(seed, step, (1 << 24) + stream, 0)


def generator(seed: int, step: int, stream: int) -> torch.Generator:
    """Such a stream."""
    return torch.Generator().manual_seed(stream_seed(seed, step, stream))
