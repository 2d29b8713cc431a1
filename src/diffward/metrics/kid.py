"""Kernel Inception distance, on whatever features the caller has."""

from __future__ import annotations

import numpy as np

from diffward.metrics.metric import METRICS, Estimate, Vectors, check_features

LEAST = 3  # leave one out, and two must remain
_CHUNK = 4_000_000


@METRICS.register(
    "kid",
    paper="Bińkowski et al. 2018 (arXiv 1801.01401); interval: Arvesen 1969, two-sample jackknife",
    access="features of two sets of pictures, at least 3 each",
    cost="(n + m)^2 d",
)
def kid(a: np.ndarray, b: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Squared maximum mean discrepancy, unbiased, kernel (x.y/d + 1)^3; about 0 for one kind.

    An unbiased estimate of nothing falls below 0 half of the time. All pairs are used, not random
    subsets of them: same mean, less noise.

    The interval is Student's t around the value, with the jackknife's variance. That is right where
    the sets differ and too wide, up to sqrt(2) times, where they do not: there the distance is
    degenerate and deleting one picture at a time counts each pair twice. Measured coverage of 95 %
    intervals: 0.95 to 1.00 on features of `mini`'s attribute network (d = 192) with 16 to 200
    pictures, 0.93 to 1.00 on Gaussians with d of 16 to 192, but down to 0.80 for skewed kernels of
    few dimensions (d = 4, 20 to 60 pictures), where the misses end too low.

    Args:
        a, b: features (n, d) and (m, d), one picture a row, each drawn independently.
        level: of the interval.

    Raises:
        InputError: fewer than 3 rows, another shape, or values that are not finite.
    """
    a, b = check_features(LEAST, a=a, b=b)
    within_a, without_a = within(a)
    within_b, without_b = within(b)
    across, across_a, across_b = between(a, b)
    return Estimate(
        within_a + within_b - 2 * across,
        jackknife_interval(
            within_a + within_b - 2 * across,
            [without_a - 2 * across_a, without_b - 2 * across_b],
            level,
        ),
        len(a),
        len(b),
    )


def within(x: Vectors) -> tuple[float, Vectors]:
    """Mean kernel of two different rows of x (n, d), and the same without each row in turn (n,)."""
    n = len(x)
    itself = ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3
    rows = _kernel_sums(x, x)[0] - itself
    total = rows.sum()
    return float(total / (n * (n - 1))), (total - 2 * rows) / ((n - 1) * (n - 2))


def between(x: Vectors, y: Vectors) -> tuple[float, Vectors, Vectors]:
    """Mean kernel of a row of x (n, d) and one of y (m, d); without each of x (n,), of y (m,)."""
    n, m = len(x), len(y)
    of_x, of_y = _kernel_sums(x, y)
    total = of_x.sum()
    return float(total / (n * m)), (total - of_x) / ((n - 1) * m), (total - of_y) / (n * (m - 1))


def jackknife_interval(value: float, without: list[Vectors], level: float) -> tuple[float, float]:
    """Student's t interval of a figure from independent samples.

    `without` has for each sample the figure without each of its members in turn, each sample up to
    a constant of its own.
    """
    from scipy.stats import t

    variance = sum((len(w) - 1) * w.var() for w in without)
    freedom = min(len(w) for w in without) - 1
    half = float(t.ppf(0.5 + level / 2, freedom) * np.sqrt(variance))
    return value - half, value + half


def _kernel_sums(x: Vectors, y: Vectors) -> tuple[Vectors, Vectors]:
    """Sums over rows of y for each row of x (n,), and the other way round (m,)."""
    of_x, of_y = np.empty(len(x)), np.zeros(len(y))
    # A chunk of the n x m kernel at a time: at 50,000 pictures a side it would be 20 GB.
    step = max(1, _CHUNK // len(y))
    for start in range(0, len(x), step):
        kernel = (x[start : start + step] @ y.T / x.shape[1] + 1) ** 3
        of_x[start : start + step] = kernel.sum(axis=1)
        of_y += kernel.sum(axis=0)
    return of_x, of_y
