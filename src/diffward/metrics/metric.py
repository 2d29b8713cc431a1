"""What a metric of pictures is, and the registry of them.

A metric compares two sets of feature vectors and never sees a picture, so that any network may be
the eye. A figure means nothing without the name of its features: the caller gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffward.errors import InputError
from diffward.registry import Registry

FeatureFunction = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 (n, H, W, 3) to features float (n, d)."""

Vectors = NDArray[np.float64]

METRICS: Registry[Callable[..., Any]] = Registry("metric")


@dataclass(frozen=True)
class Estimate:
    """A figure, its confidence interval, and the pictures on each side that it comes from."""

    value: float
    interval: tuple[float, float]
    n_a: int
    n_b: int


def check_features(least: int, **sets: ArrayLike) -> list[Vectors]:
    """The named sets of features, each as finite float64 (n, d) with one d for all.

    Raises InputError where a set has another shape, fewer than `least` rows, NaN or infinity.
    """
    checked: list[Vectors] = []
    for name, values in sets.items():
        label = name.replace("_", " ")
        features = np.asarray(values, dtype=np.float64)
        if features.ndim != 2 or not features.shape[1]:
            raise InputError(f"features {label}: must be of shape (n, d), got {features.shape}")
        if len(features) < least:
            raise InputError(
                f"features {label}: {len(features)} pictures; at least {least} are needed"
            )
        if bad := int((~np.isfinite(features)).any(axis=1).sum()):
            raise InputError(f"features {label}: {bad} of {len(features)} rows are NaN or infinite")
        if checked and features.shape[1] != checked[0].shape[1]:
            raise InputError(
                f"features {label}: {features.shape[1]} dimensions where others have "
                f"{checked[0].shape[1]}; all must come from one network"
            )
        checked.append(features)
    return checked
