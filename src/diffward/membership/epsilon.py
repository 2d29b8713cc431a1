"""A lower bound on epsilon from one training run.

Steinke, Nasr and Jagielski (2023, arXiv 2305.08846), "Privacy Auditing with One (1) Training Run".
Each of m canaries is put into the training set by an independent fair coin. The auditor sees the
model, guesses for r of the canaries whether they were in, and abstains on the others. If training
is (epsilon, delta)-DP with respect to adding or removing one picture, the number W of correct
guesses obeys, with B ~ Binomial(r, e^epsilon / (1 + e^epsilon)) (corollary 5.4, appendix D),

    P[W >= v] <= P[B >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= B < v] / i.

Every epsilon for which that is below 1 - confidence is ruled out.

Three conditions, none of which can be seen in the numbers:

- Coins: a split into exact halves is none (`diffward split --canaries` flips coins).
- Scores come from the model and the pictures alone. Cross-fitted scores (`membership.crossfit`)
  use the coins of other canaries and would prove a leak where there is none: two canaries that
  each score the other's coin are both guessed right half the time, not a quarter.
- The attack was chosen, and its sign fixed, before these scores were seen.

The bound is on what this attack shows. A model with a bound of 0 may still leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffward.errors import InputError

MIN_GUESSES = 10
UNFAIR_P = 1e-6


@dataclass(frozen=True)
class EpsilonBound:
    """With `confidence`, training is not (e, delta)-DP for any e below `epsilon`.

    Attributes:
        guesses: how many guesses gave the bound, r.
        correct: how many of them were right, v.
        canaries: how many coins were flipped, m.
    """

    epsilon: float
    delta: float
    confidence: float
    guesses: int
    correct: int
    canaries: int


def epsilon_lower_bound(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
    seed: int = 0,
) -> EpsilonBound:
    """The largest epsilon that one run rules out.

    Args:
        scores: (m,), higher = in; made without a look at `included` (see above).
        included: bool (m,), each a fair coin.
        guesses: numbers r of guesses to try: the ceil(r / 2) highest scores are guessed in, the
            floor(r / 2) lowest out. Several share the risk of error 1 - confidence equally. By
            default m, m / 2, ... m / 16, so far as they are 10 or more.
        seed: orders equal scores at random; by position they would give away a sorted list.

    Raises:
        InputError: shapes or values that do not fit, or `included` cannot be fair coins (a share of
            ones that one fair draw in a million has).
    """
    score, coin = _check(scores, included, delta, confidence)
    m = len(score)
    tried = _default_guesses(m) if guesses is None else sorted(set(map(int, guesses)))
    if not tried or tried[0] < 1 or tried[-1] > m:
        raise InputError(f"guesses {tried}: give numbers from 1 to the {m} canaries")
    order = np.lexsort((np.random.default_rng(seed).permutation(m), score))
    ranked = coin[order]
    risk = (1 - confidence) / len(tried)
    found = []
    for r in tried:
        correct = int((~ranked[: r // 2]).sum() + ranked[m - (r - r // 2) :].sum())
        found.append((epsilon_ruled_out(m, r, correct, delta, risk), r, correct))
    # At equal bounds, all zero for instance, the most guesses are told.
    epsilon, r, correct = max(found)
    return EpsilonBound(epsilon, delta, confidence, r, correct, m)


def guessing_p_value(m: int, r: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound on the probability of `correct` or more right guesses under (epsilon, delta)-DP."""
    from scipy.special import expit
    from scipy.stats import binom

    q = float(expit(epsilon))
    beyond = float(binom.sf(correct - 1, r, q))
    if delta == 0 or correct == 0:
        return min(1.0, beyond)
    # P[v - i <= B < v] for i = 1 ... v
    short = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), r, q))
    slack = float((short / np.arange(1, correct + 1)).max())
    return min(1.0, beyond + 2 * m * delta * slack)


def epsilon_ruled_out(m: int, r: int, correct: int, delta: float, risk: float) -> float:
    """The largest epsilon whose `guessing_p_value` is at most `risk`; 0 if none is.

    Without delta that is the logit of Clopper and Pearson's one-sided lower limit of the share of
    right guesses, which is searched below with delta.
    """
    from scipy.special import logit
    from scipy.stats import beta

    if correct == 0:
        return 0.0
    low, high = 0.0, float(logit(beta.ppf(risk, correct, r - correct + 1)))
    if high <= 0 or guessing_p_value(m, r, correct, 0.0, delta) > risk:
        return 0.0
    if delta == 0:
        return high
    while high - low > 1e-7 * max(1.0, high):
        middle = (low + high) / 2
        if guessing_p_value(m, r, correct, middle, delta) > risk:
            high = middle
        else:
            low = middle
    return low


def _check(
    scores: ArrayLike, included: ArrayLike, delta: float, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import binomtest

    score = np.asarray(scores, dtype=np.float64)
    coin = np.asarray(included).astype(bool)
    if score.ndim != 1 or score.shape != coin.shape or not len(score):
        raise InputError(f"scores {score.shape} do not match coins {coin.shape}")
    if bad := int((~np.isfinite(score)).sum()):
        raise InputError(f"{bad} of {len(score)} scores of canaries are NaN or infinite")
    if not 0 <= delta < 1 or not 0 < confidence < 1:
        raise InputError(f"delta {delta}, confidence {confidence}: must lie between 0 and 1")
    if binomtest(int(coin.sum()), len(coin)).pvalue < UNFAIR_P:
        raise InputError(
            f"{int(coin.sum())} of {len(coin)} canaries were trained on: that is no fair coin, and "
            "the bound on epsilon needs one; split with diffward split --canaries"
        )
    return score, coin


def _default_guesses(m: int) -> list[int]:
    few = {m // 2**halvings for halvings in range(5)}
    return sorted(r for r in few if r >= min(m, MIN_GUESSES))
