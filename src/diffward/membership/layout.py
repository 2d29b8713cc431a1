"""Which of the fixed pairs which probes use; every picture and both models share them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffward.models.pairs import Pairs

MIDDLE = 4  # pairs that the caption attacks use
CENTRE = 0.45  # of the schedule: t = 450 of 1,000 (CLiD, Zhai et al. 2024)


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
    def of_pairs(cls, pairs: Pairs) -> Layout:
        return cls.of(len(pairs), pairs.t.numpy())

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
