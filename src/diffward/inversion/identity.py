"""Who is in pictures, as a vector: features of an eye, turned so that what tells subjects apart counts.

Linear discriminants (Fisher 1936; shrinkage after Ledoit and Wolf 2004): within a subject the vectors of single pictures have unit spread in every
direction, so that distances between subjects are in units of what pose, light and background do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffward.inversion.subjects import Subjects
    from diffward.models.eyes import Eye

PICTURES = 8  # a subject's pictures in a gallery
MOST = 32  # dimensions


@dataclass(frozen=True)
class IdentitySpace:
    """Features (n, d) to identity vectors (n, k)."""

    mean: Tensor
    turn: Tensor

    @classmethod
    def fit(cls, features: Sequence[np.ndarray]) -> IdentitySpace:
        """From the features (m, d) of each of several subjects' pictures."""
        from sklearn.covariance import ledoit_wolf

        means = np.stack([one.mean(0) for one in features]).astype(np.float64)
        inside = np.concatenate([one - one.mean(0) for one in features]).astype(np.float64)
        within, _ = ledoit_wolf(inside, assume_centered=True)
        count = min(len(one) for one in features)
        within *= count / max(1, count - 1)  # residuals about a mean of so few spread too little
        values, vectors = np.linalg.eigh(within)
        whiten = vectors / np.sqrt(np.maximum(values, values[-1] * 1e-6))
        between = np.cov((means @ whiten).T)
        values, vectors = np.linalg.eigh(between)
        # Means of so many pictures spread by 1 / count without any difference between subjects.
        kept = [i for i in np.argsort(-values)[:MOST] if values[i] > 2 / count] or [
            int(values.argmax())
        ]
        turn = whiten @ vectors[:, kept]
        return cls(torch.tensor(means.mean(0)).float(), torch.tensor(turn).float())

    def of(self, features: np.ndarray) -> Tensor:
        """The vector (k,) of the subject of some pictures, features (n, d)."""
        return self.each(features).mean(0)

    def each(self, features: np.ndarray) -> Tensor:
        """The vectors (n, k) of single pictures, features (n, d)."""
        return (torch.from_numpy(np.asarray(features, np.float32)) - self.mean) @ self.turn

    def spread(self, features: np.ndarray) -> float:
        """Mean squared distance of pictures (n, d) from their mean, in units of what it is for one subject; 0 of a single one."""
        if len(features) < 2:
            return 0.0
        return float(self.each(features).var(0).mean())

    @property
    def size(self) -> int:
        return self.turn.shape[1]


def subject_features(
    subjects: Subjects, numbers: Sequence[int], eye: Eye, seed: Sequence[int], count: int = PICTURES
) -> list[np.ndarray]:
    """Features (count, d) of some subjects' pictures, drawn by a seed of their own."""
    found = []
    for number in numbers:
        pictures = subjects.pictures(number, count, seed)
        found.append(eye.features(np.stack([p.pixels for p in pictures])))
    return found
