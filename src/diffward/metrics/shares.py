"""Shares and means over training runs, and the intervals that belong to them.

Values come as (S, n): S runs (seeds), n pictures of each, picture i of every set from the same caption and noise
in the same run. A figure is the mean over all. Its interval must allow for other runs and for other pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffward.errors import InputError

Interval = tuple[float, float]
Values = NDArray[np.float64]
_CHUNK = 4_000_000  # values drawn at once


def wilson(hits: float, count: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927), for `count` independent pictures."""
    from scipy.stats import norm

    if not count or not 0 <= hits <= count:
        raise InputError(f"{hits:g} of {count} pictures is no share")
    z = float(norm.ppf(0.5 + level / 2))
    share, width = hits / count, z * z / count
    middle = (share + width / 2) / (1 + width)
    half = z / (1 + width) * np.sqrt(share * (1 - share) / count + width / (4 * count))
    # At 0 and 1 an end is exactly there; rounding must not pass it.
    return (max(0.0, middle - half) if hits else 0.0), (
        min(1.0, middle + half) if hits < count else 1.0
    )


def mean_over_runs(
    values: ArrayLike, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, Interval]:
    """Mean of values (S, n) and its interval: bootstrap of runs and of pictures within each run drawn.

    With two runs or more, the union with Student's t on their means: of three runs the bootstrap alone
    covers too little, see `roc.cluster_interval`.
    """
    values = _checked(values)
    runs, count = values.shape
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // values.size)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        run = rng.integers(0, runs, (size, runs, 1))
        means[start : start + size] = values[run, rng.integers(0, count, (size, runs, count))].mean(
            axis=(1, 2)
        )
    return float(values.mean()), _hull(
        _percentiles(means, level), student(values.mean(axis=1), level)
    )


def student(values: ArrayLike, level: float = 0.95) -> Interval | None:
    """Student's t interval of a mean of independent figures; None for fewer than two."""
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    half = float(
        t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    )
    return float(values.mean()) - half, float(values.mean()) + half


def share_over_runs(
    hits: ArrayLike, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, Interval]:
    """Share of hits (S, n): as `mean_over_runs`, and no shorter than Wilson's interval of all pictures."""
    hits = _checked(hits)
    value, ends = mean_over_runs(hits, resamples=resamples, seed=seed, level=level)
    low, high = _hull(ends, wilson(hits.sum(), hits.size, level))
    return value, (max(0.0, low), min(1.0, high))


def contrast_over_runs(
    weights: Sequence[float], sets: Sequence[ArrayLike], *, resamples: int = 2000, seed: int = 0,
    level: float = 0.95,
) -> tuple[float, Interval]:  # fmt: skip
    """sum_k w_k share_k of paired hits (S, n) each; a difference has weights (1, -1).

    As `mean_over_runs` of the pictures' own contrasts, and no shorter than what follows from Wilson's
    intervals of the shares and the hits' correlations (Newcombe 1998, method 10; Zou & Donner 2008, MOVER):
    where all pictures agree a bootstrap sees no spread.

    Raises:
        InputError: sets of unequal shape.
    """
    hits = [_checked(one) for one in sets]
    if len({one.shape for one in hits}) > 1 or len(hits) != len(weights):
        raise InputError("sets of hits are paired: they must be of one shape, with a weight each")
    own: Values = np.sum([w * one for w, one in zip(weights, hits, strict=True)], axis=0)
    value, ends = mean_over_runs(own, resamples=resamples, seed=seed, level=level)
    low, high = _hull(ends, _mover(weights, hits, level))
    least, most = (float(sum(f(0.0, w) for w in weights)) for f in (min, max))
    return value, (max(least, low), min(most, high))


def ratio_over_runs(
    base: ArrayLike, reference: ArrayLike, values: ArrayLike, *, resamples: int = 2000, seed: int = 0,
    level: float = 0.95,
) -> tuple[float, Interval] | None:  # fmt: skip
    """(base - values) / (base - reference) of mean losses: which part of the reference's gain is there.

    The same pictures are judged in every run, so a resample has the same ones in all of its runs. United with
    Student's t on the runs' own ratios.

    Args:
        base: losses (n,) before fine-tuning.
        reference, values: losses (S, n) after it.

    Returns:
        None where the reference gains nothing, or not for sure (more than a resample in forty).
    """
    reference, values = _checked(reference), _checked(values)
    base = np.asarray(base, dtype=np.float64)
    if values.shape != reference.shape or base.shape != values.shape[1:]:
        raise InputError("losses are paired: base (n,), the others (S, n) of the same pictures")
    runs, count = values.shape
    gains = [base.mean() - one.mean(axis=1) for one in (reference, values)]
    if gains[0].mean() <= 0:
        return None
    rng = np.random.default_rng(seed)
    often = rng.multinomial(count, np.full(count, 1 / count), resamples) / count
    run = rng.integers(0, runs, (resamples, runs))
    found = []
    for one in (reference, values):
        drawn = np.take_along_axis(often @ one.T, run, axis=1).mean(axis=1)
        found.append(often @ base - drawn)
    if (found[0] <= 0).mean() > 0.025:
        return None
    ends = _percentiles((found[1] / found[0])[found[0] > 0], level)
    each = student(gains[1] / gains[0], level) if (gains[0] > 0).all() else None
    return float(gains[1].mean() / gains[0].mean()), _hull(ends, each)


def _mover(weights: Sequence[float], hits: Sequence[Values], level: float) -> Interval:
    """Ends of sum w p from the ends of each p: variances recovered from them, correlations from the hits."""
    shares = [one.mean() for one in hits]
    ends = [wilson(one.sum(), one.size, level) for one in hits]
    flat = np.stack([one.ravel() for one in hits])
    spread = flat.std(axis=1)
    safe = np.where(spread > 0, spread, 1.0)
    centred = flat - flat.mean(axis=1, keepdims=True)
    correlation = centred @ centred.T / flat.shape[1] / np.outer(safe, safe)
    np.fill_diagonal(correlation, 1.0)
    value, arms = float(np.dot(weights, shares)), []
    for side in (0, 1):
        # A negative weight takes the other end of its share; the arm keeps the weight's sign.
        reach = np.array([
            w * abs(p - end[side if w > 0 else 1 - side]) for w, p, end in zip(weights, shares, ends, strict=True)
        ])  # fmt: skip
        arms.append(float(np.sqrt(max(0.0, reach @ correlation @ reach))))
    return value - arms[0], value + arms[1]


def _percentiles(values: Values, level: float) -> Interval:
    low, high = np.percentile(values, [50 - 50 * level, 50 + 50 * level])
    return float(low), float(high)


def _hull(one: Interval, other: Interval | None) -> Interval:
    return one if other is None else (min(one[0], other[0]), max(one[1], other[1]))


def _checked(values: ArrayLike) -> Values:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise InputError(
            f"values over runs: must be finite and of shape (runs, pictures), got {found.shape}"
        )
    return found
