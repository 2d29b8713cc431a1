"""The floor: ridge regression from the cores, which any network must beat to be worth its name.

Solved in the space of the rows (kernel form), since there are more numbers in a core than LoRAs in a zoo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffward.errors import InputError

FOLDS = 5
STRENGTHS = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Floor:
    """Cores (n, M, p, q) to targets (n, k): (cores - mean) weight + bias."""

    mean: Tensor
    weight: Tensor
    bias: Tensor
    strength: float

    @classmethod
    def fit(cls, cores: Tensor, targets: Tensor, groups: Sequence[int]) -> tuple[Floor, Tensor]:
        """The ridge, and what it says of each row when fitted without that row's subject, (n, k).

        The strength is the one with the least error of these answers, each target in units of its spread.

        Args:
            targets: (n, k), NaN where one is not known: that row then counts as having the mean.
            groups: subject of each row; rows of one subject are never divided.
        """
        numbers = np.asarray(groups)
        distinct = np.unique(numbers)
        if len(distinct) < 2 * FOLDS:
            raise InputError(
                f"{len(distinct)} subjects to learn from: at least {2 * FOLDS} are needed"
            )
        fold = torch.from_numpy(np.searchsorted(distinct, numbers) % FOLDS)
        x = cores.float().flatten(1)
        mean = x.mean(0)
        x = x - mean
        bias = targets.nanmean(0)
        y = torch.where(targets.isfinite(), targets - bias, 0.0)
        gram = (x @ x.T).double() / cores.shape[1]
        errors, answers = [], []
        spread = y.std(0).clamp_min(1e-6)
        for strength in STRENGTHS:
            found = torch.zeros_like(y)
            for part in range(FOLDS):
                inside, outside = (fold != part).nonzero()[:, 0], (fold == part).nonzero()[:, 0]
                dual = _solve(gram[inside][:, inside], y[inside], strength)
                found[outside] = (gram[outside][:, inside] @ dual).float()
            errors.append(float((((found - y) / spread)[targets.isfinite()]).square().mean()))
            answers.append(found)
        best = int(np.argmin(errors))
        weight = x.T @ _solve(gram, y, STRENGTHS[best]).float() / cores.shape[1]
        return cls(mean, weight, bias, STRENGTHS[best]), answers[best] + bias

    def __call__(self, cores: Tensor) -> Tensor:
        return (cores.float().flatten(1) - self.mean) @ self.weight + self.bias


def _solve(gram: Tensor, y: Tensor, strength: float) -> Tensor:
    """(gram + strength I)^-1 y, in double precision."""
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + strength * eye, y.to(gram.dtype))
