"""All statistics of membership inference in one place.

Everywhere: scores are 1-d float arrays and HIGHER MEANS MEMBER. `members` are the scores of the
pictures the model was trained on, `non_members` of those held out of the same random split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffward.errors import InputError

Scores = NDArray[np.float64]
Counts = NDArray[np.int64]
Interval = tuple[float, float]

FPR_GRID = (0.01, 0.05, 0.1)
MIN_NON_MEMBERS = {0.01: 1000, 0.05: 20, 0.1: 10}
CHANCE_P = 0.01
CHANCE_MARGIN = 0.05
_CHUNK = 4_000_000


def check_scores(members: ArrayLike, non_members: ArrayLike) -> tuple[Scores, Scores]:
    """Both sides as finite float64 vectors.

    Raises InputError if a side has fewer than 2 scores or if any score is NaN or infinite.
    """
    sides = []
    for name, values in (("members", members), ("non-members", non_members)):
        scores = np.asarray(values, dtype=np.float64)
        if scores.ndim != 1:
            raise InputError(f"scores of {name} must be a vector, got shape {scores.shape}")
        if len(scores) < 2:
            raise InputError(f"{len(scores)} {name}: at least 2 pictures are needed on each side")
        if bad := int((~np.isfinite(scores)).sum()):
            raise InputError(f"{bad} of {len(scores)} scores of {name} are NaN or infinite")
        sides.append(scores)
    return sides[0], sides[1]


def auc(members: ArrayLike, non_members: ArrayLike) -> float:
    """P(member score > non-member score) + P(tie)/2, the Mann-Whitney statistic."""
    _, count_m, count_n = _counts(*check_scores(members, non_members))
    return float(_auc_of_counts(count_m[None], count_n[None])[0])


def auc_signfree(members: ArrayLike, non_members: ArrayLike) -> float:
    """max(AUC, 1 - AUC): members that stand out by scoring *low* leak as well."""
    value = auc(members, non_members)
    return max(value, 1.0 - value)


def signfree_interval(interval: Interval) -> Interval:
    """The image of an AUC interval under max(a, 1 - a); its lower end is 0.5 if 0.5 lies inside.

    A percentile bootstrap of the sign-free AUC itself would be biased upwards near chance.
    """
    low, high = interval
    upper = max(high, 1.0 - low)
    return (
        (0.5, upper) if low <= 0.5 <= high else (min(max(low, 1 - low), max(high, 1 - high)), upper)
    )


def roc_curve(members: ArrayLike, non_members: ArrayLike) -> tuple[Scores, Scores]:
    """(fpr, tpr), from (0, 0) to (1, 1), one point for each distinct score."""
    members, non_members = check_scores(members, non_members)
    _, count_m, count_n = _counts(members, non_members)
    tpr = np.concatenate([[0], np.cumsum(count_m[::-1])]) / len(members)
    fpr = np.concatenate([[0], np.cumsum(count_n[::-1])]) / len(non_members)
    return fpr, tpr


def tpr_at_fpr(members: ArrayLike, non_members: ArrayLike, fpr: float) -> float:
    """Best TPR over thresholds whose realised FPR on the non-members is at most `fpr`."""
    if not 0 < fpr < 1:
        raise InputError(f"false positive rate must lie between 0 and 1, got {fpr}")
    _, count_m, count_n = _counts(*check_scores(members, non_members))
    return float(_tpr_of_counts(count_m[None], count_n[None], fpr)[0])


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


def bootstrap(
    members: ArrayLike,
    non_members: ArrayLike,
    statistic: str | Callable[[Scores, Scores], float] = "auc",
    n_boot: int = 2000,
    seed: int = 0,
    groups: tuple[ArrayLike, ArrayLike] | None = None,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a stratified bootstrap; thresholds are found anew in each resample.

    `statistic` is "auc", "tpr@FPR" (e.g. "tpr@0.05"), both vectorised, or any function of two
    score vectors (a plain loop). With `groups` (labels of members, labels of non-members: an
    identity, a training run) whole groups are drawn. Zero width when classes separate perfectly:
    `auc_interval` and `tpr_interval` mend that.
    """
    members, non_members = check_scores(members, non_members)
    rng = np.random.default_rng(seed)
    labels = groups if groups is not None else (None, None)
    if callable(statistic):
        draw_m, draw_n = _drawer(members, labels[0], rng), _drawer(non_members, labels[1], rng)
        values = np.array(
            [statistic(members[draw_m()], non_members[draw_n()]) for _ in range(n_boot)]
        )
    else:
        values = _bootstrap_counts(members, non_members, statistic, n_boot, rng, labels)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def delong_ci(members: ArrayLike, non_members: ArrayLike, level: float = 0.95) -> Interval:
    """DeLong, DeLong and Clarke-Pearson (1988) interval of the AUC, clipped to [0, 1]."""
    from scipy.stats import norm

    members, non_members = check_scores(members, non_members)
    unique, count_m, count_n = _counts(members, non_members)
    at_m, at_n = np.searchsorted(unique, members), np.searchsorted(unique, non_members)
    v_members = (np.cumsum(count_n) - count_n / 2)[at_m] / len(non_members)
    v_non = 1 - (np.cumsum(count_m) - count_m / 2)[at_n] / len(members)
    variance = v_members.var(ddof=1) / len(members) + v_non.var(ddof=1) / len(non_members)
    half = norm.ppf(0.5 + level / 2) * np.sqrt(variance)
    value = v_members.mean()
    return float(max(0.0, value - half)), float(min(1.0, value + half))


def newcombe_ci(value: float, n_members: int, n_non_members: int, level: float = 0.95) -> Interval:
    """Score-type interval of an AUC that stays honest for few pictures and for AUC = 1.

    Newcombe (2006), Statistics in Medicine 25, part 2, method 5: all theta with
    |theta - value| <= z * sd(theta), where sd is Hanley and McNeil's (1982) with both sample
    sizes in the correction terms replaced by their mean.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = norm.ppf(0.5 + level / 2)
    extra = (n_members + n_non_members) / 2 - 1

    def deviation(theta: float) -> float:
        spread = 1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        variance = theta * (1 - theta) * spread / (n_members * n_non_members)
        return abs(theta - value) - z * float(np.sqrt(variance))

    # sd is zero at 0 and 1, which would itself be a root there: step inside.
    tiny = 1e-12
    low = 0.0 if value <= tiny else brentq(deviation, 0.0, min(value, 1 - tiny))
    high = 1.0 if value >= 1 - tiny else brentq(deviation, max(value, tiny), 1.0)
    return float(low), float(high)


def auc_interval(
    members: ArrayLike,
    non_members: ArrayLike,
    seed: int = 0,
    groups: tuple[ArrayLike, ArrayLike] | None = None,
) -> Interval:
    """95 % interval of the AUC: the wider union of the bootstrap's and Newcombe's method 5.

    The bootstrap carries ties, unequal spread and groups; Newcombe's the small samples, where a
    bootstrap of 5 against 5 separated pictures would claim [1, 1].
    """
    members, non_members = check_scores(members, non_members)
    boot = bootstrap(members, non_members, "auc", seed=seed, groups=groups)
    score = newcombe_ci(auc(members, non_members), len(members), len(non_members))
    return min(boot[0], score[0]), max(boot[1], score[1])


def tpr_interval(
    members: ArrayLike,
    non_members: ArrayLike,
    fpr: float,
    seed: int = 0,
    groups: tuple[ArrayLike, ArrayLike] | None = None,
) -> Interval:
    """95 % interval of the TPR: union of the bootstrap's (threshold re-derived) and Clopper-Pearson's."""
    from scipy.stats import binomtest

    members, non_members = check_scores(members, non_members)
    boot = bootstrap(members, non_members, f"tpr@{fpr}", seed=seed, groups=groups)
    hits = round(tpr_at_fpr(members, non_members, fpr) * len(members))
    exact = binomtest(hits, len(members)).proportion_ci(method="exact")
    return min(boot[0], float(exact.low)), max(boot[1], float(exact.high))


def summarise(
    members: ArrayLike,
    non_members: ArrayLike,
    seed: int = 0,
    groups: tuple[ArrayLike, ArrayLike] | None = None,
) -> dict[str, Any]:
    """One attack's figures with the field names of report.json, plain Python values only.

    auc, auc_ci95, auc_signfree, auc_signfree_ci95, tpr_at_fpr, tpr_at_fpr_ci95 (both keyed "0.01",
    "0.05", "0.1"), tpr_at_fpr_reason (only the keys left null, why), n_members, n_non_members.
    With n non-members false positive rates come in steps of 1/n, so a TPR is null at 1 % below
    1,000 non-members (DESIGN §5: ten false positives), at 5 % below 20 and at 10 % below 10 (not
    one false positive fits). Raises InputError as `check_scores` does.
    """
    members, non_members = check_scores(members, non_members)
    value = auc(members, non_members)
    interval = auc_interval(members, non_members, seed, groups)
    tpr: dict[str, float | None] = {}
    tpr_ci: dict[str, list[float] | None] = {}
    reason: dict[str, str] = {}
    for fpr in FPR_GRID:
        key, needed = str(fpr), MIN_NON_MEMBERS[fpr]
        if len(non_members) < needed:
            tpr[key] = tpr_ci[key] = None
            reason[key] = (
                f"needs at least {needed} non-members to mean anything; there are {len(non_members)}"
            )
            continue
        tpr[key] = tpr_at_fpr(members, non_members, fpr)
        tpr_ci[key] = list(tpr_interval(members, non_members, fpr, seed, groups))
    return {
        "auc": value,
        "auc_ci95": list(interval),
        "auc_signfree": max(value, 1 - value),
        "auc_signfree_ci95": list(signfree_interval(interval)),
        "tpr_at_fpr": tpr,
        "tpr_at_fpr_ci95": tpr_ci,
        "tpr_at_fpr_reason": reason,
        "n_members": len(members),
        "n_non_members": len(non_members),
    }


@dataclass(frozen=True)
class ChanceCheck:
    """Whether a control came out at chance; `detectable` is the smallest |AUC - 0.5| it could flag."""

    ok: bool
    auc: float
    p_value: float
    detectable: float
    reason: str


def at_chance(members: ArrayLike, non_members: ArrayLike) -> ChanceCheck:
    """Is a control consistent with AUC 0.5?

    It fails only if it is off by both measures: significantly (two-sided Mann-Whitney p < 0.01)
    and by enough to matter (|AUC - 0.5| >= 0.05). Significance alone would fail huge sets on
    trivia, size alone would fail small honest ones on luck. One honest control in 100 fails.
    """
    from scipy.stats import mannwhitneyu, norm

    members, non_members = check_scores(members, non_members)
    m, n = len(members), len(non_members)
    value = auc(members, non_members)
    if np.ptp(np.concatenate([members, non_members])) == 0:
        p_value = 1.0
    else:
        p_value = float(mannwhitneyu(members, non_members, alternative="two-sided").pvalue)
    noise = float(norm.ppf(1 - CHANCE_P / 2) * np.sqrt((m + n + 1) / (12 * m * n)))
    detectable = min(0.5, max(CHANCE_MARGIN, noise))
    far, rare = abs(value - 0.5) >= CHANCE_MARGIN, p_value < CHANCE_P
    figures = f"AUC {value:.3f}, p = {p_value:.2g}"
    if far and rare:
        reason = f"off chance: {figures}"
    elif rare:
        reason = f"at chance: {figures}; detectable but within {CHANCE_MARGIN} of 0.5"
    else:
        reason = f"at chance: {figures}; a shift below {detectable:.2f} would go unseen"
    return ChanceCheck(not (far and rare), value, p_value, detectable, reason)


def _counts(members: Scores, non_members: Scores) -> tuple[Scores, Counts, Counts]:
    """Distinct scores in ascending order and how often each side has them."""
    unique, position = np.unique(np.concatenate([members, non_members]), return_inverse=True)
    split = len(members)
    return (
        unique,
        np.bincount(position[:split], minlength=len(unique)),
        np.bincount(position[split:], minlength=len(unique)),
    )


def _auc_of_counts(count_m: Counts, count_n: Counts) -> Scores:
    """AUC of each row of counts over ascending distinct scores, both (B, U)."""
    below = np.cumsum(count_n, axis=1) - count_n / 2
    pairs = count_m.sum(axis=1) * count_n.sum(axis=1)
    return (count_m * below).sum(axis=1) / pairs


def _tpr_of_counts(count_m: Counts, count_n: Counts, fpr: float) -> Scores:
    """TPR of each row at the lowest threshold that keeps the realised FPR at or below `fpr`."""
    hits = np.cumsum(count_m[:, ::-1], axis=1)
    false = np.cumsum(count_n[:, ::-1], axis=1)
    allowed = fpr * false[:, -1:] + 1e-9
    return np.where(false <= allowed, hits, 0).max(axis=1) / hits[:, -1]


def _bootstrap_counts(
    members: Scores,
    non_members: Scores,
    statistic: str,
    n_boot: int,
    rng: np.random.Generator,
    labels: tuple[ArrayLike | None, ArrayLike | None],
) -> Scores:
    """The statistic in `n_boot` resamples, as counts over distinct scores, a chunk at a time."""
    if statistic != "auc" and not statistic.startswith("tpr@"):
        raise ValueError(f"unknown statistic {statistic!r}: auc or tpr@FPR")
    unique = np.unique(np.concatenate([members, non_members]))
    size = len(unique)
    at_m, at_n = np.searchsorted(unique, members), np.searchsorted(unique, non_members)
    draw_m, draw_n = _drawer(members, labels[0], rng), _drawer(non_members, labels[1], rng)
    values = []
    step = max(1, _CHUNK // size)
    for start in range(0, n_boot, step):
        rows = min(step, n_boot - start)
        count_m = _resample(at_m, size, rows, draw_m, rng if labels[0] is None else None)
        count_n = _resample(at_n, size, rows, draw_n, rng if labels[1] is None else None)
        if statistic == "auc":
            values.append(_auc_of_counts(count_m, count_n))
        else:
            values.append(_tpr_of_counts(count_m, count_n, float(statistic[4:])))
    return np.concatenate(values)


def _resample(
    position: Counts,
    size: int,
    rows: int,
    draw: Callable[[], Counts],
    rng: np.random.Generator | None,
) -> Counts:
    """(rows, size) counts of resampled positions: all rows at once, or by `draw` where rng is None."""
    if rng is None:
        return np.stack([np.bincount(position[draw()], minlength=size) for _ in range(rows)])
    drawn = position[rng.integers(0, len(position), (rows, len(position)))]
    drawn += np.arange(rows)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)


def _drawer(
    scores: Scores, labels: ArrayLike | None, rng: np.random.Generator
) -> Callable[[], Counts]:
    """A function that draws the indices of one resample: of single pictures, or of whole groups."""
    if labels is None:
        return lambda: rng.integers(0, len(scores), len(scores))
    names, group = np.unique(np.asarray(labels), return_inverse=True)
    if len(group) != len(scores):
        raise InputError(f"{len(group)} group labels for {len(scores)} scores")
    parts = [np.flatnonzero(group == i) for i in range(len(names))]
    return lambda: np.concatenate([parts[i] for i in rng.integers(0, len(parts), len(parts))])
