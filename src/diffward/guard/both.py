"""Drawing from two domains at once: as many pictures of either in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.finetune.method import Run
from diffward.finetune.plain import Plain
from diffward.finetune.sampler import generator

if TYPE_CHECKING:
    from diffward.models.features import Features

_ORDER = 77  # the stream of random numbers that orders pictures


class Rows:
    """Rows of a domain's pictures, step by step: each once before any comes again."""

    def __init__(self, count: int, size: int, seed: int, stream: int) -> None:
        self.count, self.size, self.seed, self.stream = count, size, seed, _ORDER + stream
        self._epoch: tuple[int, Tensor] = (-1, torch.zeros(0, dtype=torch.long))

    def __call__(self, step: int) -> Tensor:
        """Rows (size,) of step number `step`."""
        return torch.stack([self._row(step * self.size + i) for i in range(self.size)])

    def _row(self, position: int) -> Tensor:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch[0]:
            order = torch.randperm(self.count, generator=generator(self.seed, epoch, self.stream))
            self._epoch = epoch, order
        return self._epoch[1][place]


class Both(Plain):
    """Plain fine-tuning on two domains, half of each batch of either."""

    def __init__(self, first: int, second: int) -> None:
        self.counts = first, second

    @classmethod
    def of(cls, first: Features, second: Features) -> tuple[Features, Both]:
        """The pictures of both, and the method that draws them."""
        return first.join(second), cls(len(first), len(second))

    def start(self, run: Run) -> None:
        batch, seed = run.settings.batch, run.settings.seed
        sizes = batch // 2, batch - batch // 2
        self._draw = [
            Rows(n, size, seed, i)
            for i, (n, size) in enumerate(zip(self.counts, sizes, strict=True))
        ]

    def rows(self, step: int, micro: int) -> Tensor:
        first, second = (draw(step) for draw in self._draw)
        return torch.cat([first, second + self.counts[0]])
