"""Was the set trained on? One p-value for all pictures, where a single one proves nothing.

Dataset inference for diffusion models (CDI, Dubiński et al. 2025, arXiv 2411.12858): a one-sided
Welch test of members' against non-members' scores, and how many pictures it takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffward.errors import InputError
from diffward.membership.crossfit import crossfit_inflation

Matrix = NDArray[np.float64]

ALPHA = 0.01
RESAMPLES = 1000
_CELLS = 2_000_000
_FLAT = 1e-9  # of the scores' spread: what is smaller is rounding


def dataset_inference(
    scores: ArrayLike,
    is_member: ArrayLike,
    groups: ArrayLike | None = None,
    seed: int = 0,
    *,
    inflation: float | None = None,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """p-value of the whole set, and with how many pictures it would fall below `alpha`.

    Args:
        scores: (N,) finite, higher = member.
        groups: (N,) near-duplicates share a label and count as one picture, with their mean score.
        inflation: by how much cross-fitted scores make the test statistic spread wider than Welch's
            formula says (`crossfit_inflation` if None); it is divided by it. The paper leaves this out:
            cross-fitted as there, pictures that nothing was trained on came out at p < 0.05 in 10
            to 15 of 100 runs. 1 for scores of an attack that learns nothing.

    Returns:
        p_value: of all pictures.
        pictures_needed: smallest n a side from which on the median p-value over `resamples` random
            subsets of n members and n non-members is below `alpha`; None if that of all is not. The
            scores are those of models that learned from all pictures.
        alpha: as given.
    """
    values, member = np.asarray(scores, dtype=np.float64), np.asarray(is_member, dtype=bool)
    if values.ndim != 1 or member.shape != values.shape:
        raise InputError(f"scores {values.shape} do not match labels {member.shape}")
    if not np.isfinite(values).all():
        raise InputError("scores are NaN or infinite")
    labels = np.arange(len(values)) if groups is None else np.asarray(groups)
    first, second = (_by_group(values[side], labels[side]) for side in (member, ~member))
    least = min(len(first), len(second))
    if least < 2:
        raise InputError(f"{least} pictures on one side: at least 2 are needed on each")
    factor = crossfit_inflation(len(first) + len(second)) if inflation is None else inflation
    if not factor >= 1:
        raise InputError(f"inflation {factor}: must be at least 1")
    # The variances of the subsets come from sums of squares: small numbers keep them exact.
    everything = np.concatenate([first, second])
    centre, spread = everything.mean(), everything.std()
    first, second = ((side - centre) / (spread if spread > 0 else 1.0) for side in (first, second))
    a, b = (_moments(side[None], [len(side)]) for side in (first, second))
    whole = _welch(a, b, factor)
    enough = np.flatnonzero(_medians(first, second, factor, resamples, seed) >= alpha)
    # Sizes start at 2.
    needed = int(enough[-1]) + 3 if len(enough) else 2
    return {
        "p_value": float(whole[0, 0]),
        "pictures_needed": needed if needed <= least else None,
        "alpha": alpha,
    }


def _by_group(values: Matrix, labels: NDArray[Any]) -> Matrix:
    """Mean score of each group."""
    number = np.unique(labels, return_inverse=True)[1].ravel()
    return np.bincount(number, weights=values) / np.bincount(number)


def _medians(first: Matrix, second: Matrix, factor: float, resamples: int, seed: int) -> Matrix:
    """Median p-value of subsets of 2, 3 … pictures a side, as many as the smaller side has.

    Subsets grow: the first n of a random order, so that one order serves all sizes.
    """
    rng = np.random.default_rng(seed)
    sizes = np.arange(2, min(len(first), len(second)) + 1)
    rows = max(1, _CELLS // max(len(first), len(second)))
    parts = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = [rng.permuted(np.tile(side, (count, 1)), axis=1) for side in (first, second)]
        a, b = (_moments(side, sizes) for side in drawn)
        parts.append(_welch(a, b, factor).astype(np.float32))
    return np.median(np.concatenate(parts), axis=0)


def _moments(values: Matrix, sizes: ArrayLike) -> tuple[Matrix, Matrix, NDArray[Any]]:
    """Means and variances (rows, sizes) of the first n of each row, and n."""
    n = np.asarray(sizes)
    total, squares = (np.cumsum(v, axis=1)[:, n - 1] for v in (values, values**2))
    return total / n, np.maximum(squares - total**2 / n, 0) / (n - 1), n


def _welch(
    first: tuple[Matrix, Matrix, NDArray[Any]],
    second: tuple[Matrix, Matrix, NDArray[Any]],
    factor: float,
) -> Matrix:
    """One-sided p-values that the first means are the higher ones (Welch 1947), statistic over `factor`."""
    from scipy.stats import t

    (mean_a, var_a, n_a), (mean_b, var_b, n_b) = first, second
    a, b = np.maximum(var_a, _FLAT**2) / n_a, np.maximum(var_b, _FLAT**2) / n_b
    freedom = (a + b) ** 2 / (a**2 / (n_a - 1) + b**2 / (n_b - 1))
    return np.asarray(t.sf((mean_a - mean_b) / np.sqrt(a + b) / factor, freedom))
