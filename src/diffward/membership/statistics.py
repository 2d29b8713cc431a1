"""All statistics of membership inference: figures of an attack, tests, thresholds.

Everywhere: scores are 1-d float arrays and HIGHER MEANS MEMBER. `members` are the scores of the
pictures the model was trained on, `non_members` of those held out of the same random split. AUC,
TPR and their intervals are in `metrics.roc`, and importable from here.

`inflation` stands wherever the scores are cross-fitted (`crossfit.crossfit_inflation`): they depend
on one another, so that the AUC spreads wider than formulas for independent scores say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffward.errors import InputError
from diffward.metrics.roc import (
    Interval,
    Scores,
    advantage,
    auc,
    auc_interval,
    auc_signfree,
    bootstrap,
    check_scores,
    cluster_interval,
    delong_ci,
    newcombe_ci,
    roc_curve,
    signfree_interval,
    tpr_at_fpr,
    tpr_interval,
    widened,
)

__all__ = [
    "CHANCE_MARGIN",
    "CHANCE_P",
    "FPR_GRID",
    "FROZEN_GRID",
    "MIN_NON_MEMBERS",
    "ChanceCheck",
    "Interval",
    "Scores",
    "advantage",
    "at_chance",
    "auc",
    "auc_interval",
    "auc_signfree",
    "bootstrap",
    "check_scores",
    "cluster_interval",
    "delong_ci",
    "holm",
    "membership_p_value",
    "newcombe_ci",
    "p_values",
    "roc_curve",
    "signfree_interval",
    "summarise",
    "tpr_at_fpr",
    "tpr_at_frozen_threshold",
    "tpr_interval",
    "widened",
]

FPR_GRID = (0.01, 0.05, 0.1)
FROZEN_GRID = (0.05, 0.1)
MIN_NON_MEMBERS = {0.01: 1000, 0.05: 20, 0.1: 10}
CHANCE_P = 0.01
CHANCE_MARGIN = 0.05


def p_values(scores: ArrayLike, is_member: ArrayLike) -> Scores:
    """Conformal p-value of each picture: how rare so high a score is among the non-members.

    (1 + #{non-members with score >= s}) / (n + 1); a non-member is not counted against itself.
    """
    values = np.asarray(scores, dtype=np.float64)
    member = np.asarray(is_member, dtype=bool)
    reference = np.sort(values[~member])
    at_least = len(reference) - np.searchsorted(reference, values, side="left")
    own = (~member).astype(np.int64)
    return (1 + at_least - own) / (len(reference) + 1 - own)


def membership_p_value(members: ArrayLike, non_members: ArrayLike, inflation: float = 1.0) -> float:
    """Two-sided Mann-Whitney p-value of an attack: could so far an AUC from 0.5 be luck?

    Exact for few pictures without ties. With `inflation` the p-value's normal quantile is divided
    by it.
    """
    from scipy.stats import mannwhitneyu, norm

    members, non_members = check_scores(members, non_members)
    if not inflation >= 1:
        raise InputError(f"inflation {inflation}: must be at least 1")
    if np.ptp(np.concatenate([members, non_members])) == 0:
        return 1.0
    p_value = min(1.0, float(mannwhitneyu(members, non_members, alternative="two-sided").pvalue))
    if inflation == 1:
        return p_value
    return float(2 * norm.sf(norm.isf(p_value / 2) / inflation))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: those below 0.05 are, with 95 % confidence, all of real effects.

    Holm (1979): the i-th smallest of k is multiplied by k + 1 - i, and none may fall below one
    before it. Holds however the p-values depend on one another.
    """
    for name, value in p_values.items():
        if not 0 <= value <= 1:
            raise InputError(f"p-value of {name}: {value} is not between 0 and 1")
    adjusted = dict.fromkeys(p_values, 1.0)
    least = 0.0
    for index, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - index) * value))
        adjusted[name] = least
    return adjusted


def tpr_at_frozen_threshold(
    calibration_non_members: ArrayLike,
    members: ArrayLike,
    non_members: ArrayLike,
    fpr: float,
) -> dict[str, Any]:
    """A threshold fixed on non-members of its own, and what it does to all other pictures.

    The threshold is the k-th highest of the c calibration scores, k = floor(fpr (c + 1)), and a
    score must exceed it: a non-member then does with probability at most `fpr` (split conformal
    prediction). TPR and FPR are counts out of fixed numbers, so that Clopper and Pearson's (1934)
    intervals are exact. The FPR of this one threshold may lie above `fpr`: a leak is a TPR above
    the realised FPR, not above `fpr`.

    Returns:
        threshold, tpr, tpr_ci95, fpr, fpr_ci95 (realised), n_calibration.

    Raises:
        InputError: `fpr` is finer than the calibration scores can tell (c + 1 < 1 / fpr).
    """
    if not 0 < fpr < 1:
        raise InputError(f"false positive rate must lie between 0 and 1, got {fpr}")
    members, non_members = check_scores(members, non_members)
    calibration, _ = check_scores(calibration_non_members, non_members)
    rank = int(np.floor(fpr * (len(calibration) + 1) + 1e-9))
    if rank < 1:
        raise InputError(
            f"a threshold for a false positive rate of {fpr} needs at least "
            f"{_least_calibration(fpr)} calibration non-members; there are {len(calibration)}"
        )
    threshold = float(np.sort(calibration)[-rank])
    tpr, tpr_ci = _rate(members > threshold)
    realised, fpr_ci = _rate(non_members > threshold)
    return {
        "threshold": threshold,
        "tpr": tpr,
        "tpr_ci95": tpr_ci,
        "fpr": realised,
        "fpr_ci95": fpr_ci,
        "n_calibration": len(calibration),
    }


def summarise(
    members: ArrayLike,
    non_members: ArrayLike,
    seed: int = 0,
    groups: tuple[ArrayLike, ArrayLike] | None = None,
    inflation: float = 1.0,
) -> dict[str, Any]:
    """One attack's figures with the field names of report.json, plain Python values only.

    - auc, auc_ci95, auc_delong_ci95, auc_signfree, auc_signfree_ci95, inflation: all intervals of
      the AUC are widened by `inflation`, those of rates are not.
    - advantage: max |TPR - FPR|.
    - tpr_at_fpr, tpr_at_fpr_ci95 (keyed "0.01", "0.05", "0.1"): thresholds found on the pictures
      judged. tpr_at_fpr_reason: why, for the keys left null. With n non-members false positive
      rates come in steps of 1/n, so a TPR is null at 1 % below 1,000 non-members (DESIGN §5: ten
      false positives), at 5 % below 20 and at 10 % below 10 (not one false positive fits).
    - frozen (keyed "0.05", "0.1"), frozen_reason: `tpr_at_frozen_threshold` with a random half of
      the non-members for calibration, the other half and all members judged. The half depends on
      the seed and on nothing else. Null for too few of them, and for `groups`: pictures that
      depend on one another have no exact intervals.
    - n_members, n_non_members.

    Raises InputError as `check_scores` does.
    """
    members, non_members = check_scores(members, non_members)
    value = auc(members, non_members)
    interval = auc_interval(members, non_members, seed, groups, inflation)
    tpr: dict[str, float | None] = {}
    tpr_ci: dict[str, list[float] | None] = {}
    reason: dict[str, str] = {}
    for fpr in FPR_GRID:
        key, needed = str(fpr), MIN_NON_MEMBERS[fpr]
        if len(non_members) < needed:
            tpr[key] = tpr_ci[key] = None
            reason[key] = (
                f"needs at least {needed} non-members to mean anything; "
                f"there are {len(non_members)}"
            )
            continue
        tpr[key] = tpr_at_fpr(members, non_members, fpr)
        tpr_ci[key] = list(tpr_interval(members, non_members, fpr, seed, groups))
    frozen, frozen_reason = _frozen(members, non_members, seed, groups is not None)
    return {
        "auc": value,
        "auc_ci95": list(interval),
        "auc_delong_ci95": list(widened(value, delong_ci(members, non_members), inflation)),
        "auc_signfree": max(value, 1 - value),
        "auc_signfree_ci95": list(signfree_interval(interval)),
        "inflation": float(inflation),
        "advantage": advantage(members, non_members),
        "tpr_at_fpr": tpr,
        "tpr_at_fpr_ci95": tpr_ci,
        "tpr_at_fpr_reason": reason,
        "frozen": frozen,
        "frozen_reason": frozen_reason,
        "n_members": len(members),
        "n_non_members": len(non_members),
    }


@dataclass(frozen=True)
class ChanceCheck:
    """Whether a control is at chance; `detectable` is the smallest |AUC - 0.5| it could flag."""

    ok: bool
    auc: float
    p_value: float
    detectable: float
    reason: str


def at_chance(
    members: ArrayLike, non_members: ArrayLike, family: int = 1, inflation: float = 1.0
) -> ChanceCheck:
    """Is a control consistent with AUC 0.5?

    It fails only if it is off by both measures: significantly (two-sided Mann-Whitney
    p < 0.01 / `family`) and by enough to matter (|AUC - 0.5| >= 0.05). Significance alone would
    fail huge sets on trivia, size alone would fail small honest ones on luck. Of a `family` of
    controls at least one fails in at most one honest audit of 100. `p_value` is as it came.
    """
    from scipy.stats import norm

    if family < 1:
        raise InputError(f"a family of {family} controls: at least 1")
    members, non_members = check_scores(members, non_members)
    m, n = len(members), len(non_members)
    level = CHANCE_P / family
    value = auc(members, non_members)
    p_value = membership_p_value(members, non_members, inflation)
    noise = inflation * float(norm.ppf(1 - level / 2) * np.sqrt((m + n + 1) / (12 * m * n)))
    detectable = min(0.5, max(CHANCE_MARGIN, noise))
    far, rare = abs(value - 0.5) >= CHANCE_MARGIN, p_value < level
    figures = f"AUC {value:.3f}, p = {p_value:.2g}"
    if family > 1:
        figures += f" (one of {family} controls: below {level:.2g} counts)"
    if far and rare:
        reason = f"off chance: {figures}"
    elif rare:
        reason = f"at chance: {figures}; detectable but within {CHANCE_MARGIN} of 0.5"
    else:
        reason = f"at chance: {figures}; a shift below {detectable:.2f} would go unseen"
    return ChanceCheck(not (far and rare), value, p_value, detectable, reason)


def _least_calibration(fpr: float) -> int:
    """The smallest c with fpr (c + 1) >= 1."""
    return int(np.ceil(1 / fpr - 1e-9)) - 1


def _rate(hit: np.ndarray) -> tuple[float, list[float]]:
    """Share of hits and its exact 95 % interval."""
    from scipy.stats import binomtest

    exact = binomtest(int(hit.sum()), len(hit)).proportion_ci(method="exact")
    return float(hit.mean()), [float(exact.low), float(exact.high)]


def _frozen(
    members: Scores, non_members: Scores, seed: int, grouped: bool
) -> tuple[dict[str, dict[str, Any] | None], dict[str, str]]:
    """`summarise`'s frozen and frozen_reason."""
    order = np.random.default_rng([seed, 1]).permutation(len(non_members))
    half = len(non_members) // 2
    frozen: dict[str, dict[str, Any] | None] = {}
    reason: dict[str, str] = {}
    for fpr in FROZEN_GRID:
        key, needed = str(fpr), 2 * _least_calibration(fpr)
        if grouped:
            frozen[key] = None
            reason[key] = "pictures of one group depend on one another: no exact interval"
        elif len(non_members) < needed:
            frozen[key] = None
            reason[key] = (
                f"needs at least {needed} non-members, half of them to set the threshold; "
                f"there are {len(non_members)}"
            )
        else:
            frozen[key] = tpr_at_frozen_threshold(
                non_members[order[:half]], members, non_members[order[half:]], fpr
            )
    return frozen, reason
