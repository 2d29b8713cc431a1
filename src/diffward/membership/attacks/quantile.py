"""Is the error lower than it should be for such a picture? Quantile regression on non-members."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import OFF, ON, Bank
from diffward.membership.features import binned, errors, log

if TYPE_CHECKING:
    from diffward.membership.crossfit import Decision, Matrix

LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
BINS = 3
_STEPS = 50


@ATTACKS.register(
    "quantile",
    paper="Tang et al. 2024 (arXiv 2312.05140)",
    access="grey box, with the base model and known non-members",
    cost="2 queries a pair",
    asks=(("errors", ON), ("errors", OFF)),
    needs=("labels",),
    suite="standard",
)
def quantile(bank: Bank) -> np.ndarray:
    """A member's error lies below the quantiles of non-members as hard for the base: s = mean_a [q_a(x) - l(x)].

    The authors predict quantiles of the error from the picture, by a network trained on thousands of
    non-members, and let a bag of them vote at one level. Here what the picture is like is told by the
    base's own errors (early, middle and late timesteps): few numbers, that explain most of the spread
    and need few non-members. Levels .05 … .5 are averaged, so that scores rank all pictures. Errors
    are logarithms, so that a plain line fits and residuals of easy and hard pictures compare.
    """
    base = binned(log(bank.of("errors", OFF)), bank.layout, BINS)
    return bank.crossfit(np.column_stack([errors(bank).mean(axis=1), base]), below_quantiles)


def below_quantiles(x: Matrix, y: np.ndarray) -> Decision:
    """Column 0 is the error, the others what it is predicted from. Members are not looked at."""
    error, known = x[~y, 0], x[~y, 1:]
    mean, spread = known.mean(axis=0), known.std(axis=0)
    scale = np.where(spread > 1e-9, spread, 1.0)

    def design(values: Matrix) -> Matrix:
        return np.column_stack([np.ones(len(values)), (values - mean) / scale])

    lines = [quantile_line(design(known), error, level) for level in LEVELS]
    return lambda new: design(new[:, 1:]) @ np.mean(lines, axis=0) - new[:, 0]


def quantile_line(design: Matrix, target: Matrix, level: float) -> Matrix:
    """Coefficients (d,) of the linear quantile of target (n,) given design (n, d), column 0 ones.

    Minimises the pinball loss, smoothed by a Gaussian of bandwidth h: differentiable, so Newton's
    method takes milliseconds where linear programming takes seconds (Fernandes et al. 2021,
    J. Bus. Econ. Stat. 39; h of He et al. 2023, J. Econometrics 232, times the residuals' spread).
    """
    n, d = design.shape
    line: Matrix = np.linalg.lstsq(design, target, rcond=None)[0].astype(np.float64)
    spread = max(float((target - design @ line).std()), 1e-9)
    h = spread * max(0.05, ((d + np.log(n)) / n) ** 0.4)
    ridge = 1e-6 * n / spread * np.eye(d)  # more coefficients than pictures stay solvable

    def loss(at: Matrix) -> float:
        left = target - design @ at
        bell = np.exp(-((left / h) ** 2) / 2) / np.sqrt(2 * np.pi)
        return float((left * (level - ndtr(-left / h)) + h * bell).sum())

    value = loss(line)
    for _ in range(_STEPS):
        left = (target - design @ line) / h
        slope = design.T @ (level - ndtr(-left))
        bell = np.exp(-(left**2) / 2) / np.sqrt(2 * np.pi) / h
        step = np.linalg.solve((design.T * bell) @ design + ridge, slope)
        size, new = 1.0, loss(line + step)
        while new > value and size > 1e-6:
            size /= 2
            new = loss(line + size * step)
        line, value = line + size * step, min(new, value)
        if np.abs(size * step).max() < 1e-7 * spread:
            break
    return line
