"""Which of two models draws pictures nearer to the real ones."""

from __future__ import annotations

import numpy as np

from diffward.errors import InputError
from diffward.metrics.kid import LEAST, between, jackknife_interval, within
from diffward.metrics.metric import Estimate, check_features


def kid_difference(
    generated_a: np.ndarray,
    generated_b: np.ndarray,
    real: np.ndarray,
    *,
    paired: bool = True,
    level: float = 0.95,
) -> Estimate:
    """KID(a, real) - KID(b, real): below 0, a is nearer. Sharper than comparing two intervals.

    What the real pictures share among themselves cancels, and their luck is common to both sides.
    The jackknife deletes a pair (row i of a with row i of b) or a real picture at a time, see
    `kid.kid` for what its interval covers.

    Args:
        generated_a, generated_b: features (n, d); row i of both from the same caption and noise.
        real: features (m, d), none of them a picture that either model was tuned on.
        paired: False where the two were drawn apart; then they may differ in number.
        level: of the interval.

    Returns:
        n_a and n_b are the numbers of generated pictures.

    Raises:
        InputError: as `kid.kid` does, or pairs that do not match in number.
    """
    a, b, real = check_features(LEAST, generated_a=generated_a, generated_b=generated_b, real=real)
    if paired and len(a) != len(b):
        raise InputError(
            f"{len(a)} and {len(b)} generated pictures are no pairs: draw both from the same "
            "captions and seeds, or say paired=False"
        )
    within_a, without_a = within(a)
    within_b, without_b = within(b)
    across_a, without_a_real, a_without_real = between(a, real)
    across_b, without_b_real, b_without_real = between(b, real)
    value = within_a - 2 * across_a - (within_b - 2 * across_b)
    of_a, of_b = without_a - 2 * without_a_real, without_b - 2 * without_b_real
    of_real = 2 * (b_without_real - a_without_real)
    without = [of_a - of_b, of_real] if paired else [of_a, of_b, of_real]
    return Estimate(value, jackknife_interval(value, without, level), len(a), len(b))
