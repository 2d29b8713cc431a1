"""Drawing from two domains at once: as many pictures of either in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.finetune.method import Run
from diffward.finetune.plain import Plain
from diffward.finetune.sampler import Epochs, stream_seed
from diffward.guard.processes import world

if TYPE_CHECKING:
    from diffward.models.features import Features

_ORDER = 77  # the stream of random numbers that orders pictures


class Rows:
    """Rows of a domain's pictures, step by step; of several processes each takes its part of a step's."""

    def __init__(self, count: int, size: int, seed: int, stream: int) -> None:
        self.size = size * world()[0]
        self._order = Epochs(
            torch.arange(count), lambda epoch: stream_seed(seed, epoch, _ORDER + stream)
        )

    def __call__(self, step: int) -> Tensor:
        """Rows of step number `step`, those of all processes."""
        return self._order(step * self.size, self.size)


def part() -> slice:
    """This process's part of what is drawn for all."""
    count, place = world()
    return slice(place, None, count)


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
        first, second = (draw(step)[part()] for draw in self._draw)
        return torch.cat([first, second + self.counts[0]])
