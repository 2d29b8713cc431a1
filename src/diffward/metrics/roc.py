"""The ROC curve of two score vectors: AUC, TPR at a given FPR, and their confidence intervals.

Everywhere: scores are 1-d float arrays and HIGHER MEANS MEMBER. `members` are the scores of the
pictures the model was trained on, `non_members` of those held out of the same random split. Here,
below training and the audit, as both read off how well members are told from others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffward.errors import InputError

Scores = NDArray[np.float64]
Counts = NDArray[np.int64]
Interval = tuple[float, float]

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


def widened(value: float, interval: Interval, factor: float) -> Interval:
    """The interval with both arms around `value` `factor` times as long, within 0 and 1."""
    if not factor >= 1:
        raise InputError(f"inflation {factor}: must be at least 1")
    low, high = interval
    return max(0.0, value - factor * (value - low)), min(1.0, value + factor * (high - value))


def roc_curve(members: ArrayLike, non_members: ArrayLike) -> tuple[Scores, Scores]:
    """(fpr, tpr), from (0, 0) to (1, 1), one point for each distinct score."""
    members, non_members = check_scores(members, non_members)
    _, count_m, count_n = _counts(members, non_members)
    tpr = np.concatenate([[0], np.cumsum(count_m[::-1])]) / len(members)
    fpr = np.concatenate([[0], np.cumsum(count_n[::-1])]) / len(non_members)
    return fpr, tpr


def advantage(members: ArrayLike, non_members: ArrayLike) -> float:
    """max |TPR - FPR| over all thresholds, in [0, 1]: the two-sample Kolmogorov-Smirnov distance.

    Its maximum finds luck as well: with m and n pictures it is about 0.87 sqrt(1/m + 1/n) on
    average where nothing leaks, 0.19 with 40 a side.
    """
    fpr, tpr = roc_curve(members, non_members)
    return float(np.abs(tpr - fpr).max())


def tpr_at_fpr(members: ArrayLike, non_members: ArrayLike, fpr: float) -> float:
    """Best TPR over thresholds whose realised FPR on the non-members is at most `fpr`."""
    if not 0 < fpr < 1:
        raise InputError(f"false positive rate must lie between 0 and 1, got {fpr}")
    _, count_m, count_n = _counts(*check_scores(members, non_members))
    return float(_tpr_of_counts(count_m[None], count_n[None], fpr)[0])


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
    inflation: float = 1.0,
) -> Interval:
    """95 % interval of the AUC: the wider union of the bootstrap's and Newcombe's method 5.

    The bootstrap carries ties, unequal spread and groups; Newcombe's the small samples, where a
    bootstrap of 5 against 5 separated pictures would claim [1, 1]. `inflation` lengthens both arms,
    for scores that depend on one another (`membership.crossfit.crossfit_inflation`).
    """
    members, non_members = check_scores(members, non_members)
    boot = bootstrap(members, non_members, "auc", seed=seed, groups=groups)
    value = auc(members, non_members)
    score = newcombe_ci(value, len(members), len(non_members))
    return widened(value, (min(boot[0], score[0]), max(boot[1], score[1])), inflation)


def cluster_interval(
    runs: Sequence[tuple[ArrayLike, ArrayLike]],
    n_boot: int = 2000,
    seed: int = 0,
    shared: bool = False,
) -> tuple[float, Interval]:
    """Mean AUC over training runs (seeds) and a 95 % interval that allows for other runs too.

    Args:
        runs: (members, non_members) scores of each run, two at least.
        n_boot: resamples: of runs, and of pictures within each run drawn.
        shared: the runs judged the same pictures in the same order. A resample then has the same
            pictures in every run: their luck does not average out over runs.

    The union of the bootstrap's interval and that of Student's t on the AUCs of the runs, without
    which few runs would seem surer than they are: where runs truly differ, the bootstrap alone
    covers 79 % with two and 83 % with three. Raises InputError on a single run, as `check_scores`
    does, and where `shared` runs are not of equal size.
    """
    from scipy.stats import t

    sides = [check_scores(members, non_members) for members, non_members in runs]
    count = len(sides)
    if count < 2:
        raise InputError(f"{count} training runs: an interval over runs needs at least 2")
    if shared and len({(len(members), len(others)) for members, others in sides}) > 1:
        raise InputError("runs on the same pictures have as many scores as one another")
    rng = np.random.default_rng(seed)
    aucs = np.array([auc(*side) for side in sides])
    # One row a resample, one column a place in it; a place may get any of the runs.
    run = rng.integers(0, count, (n_boot, count))
    drawn = np.empty((n_boot, count))
    for index, (members, others) in enumerate(sides):
        own = np.random.default_rng([seed, 0 if shared else index + 1])
        rows = n_boot if shared else n_boot * count
        values = _bootstrap_counts(members, others, "auc", rows, own, (None, None))
        values = np.broadcast_to(values.reshape(n_boot, -1), (n_boot, count))
        drawn = np.where(run == index, values, drawn)
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    mean = float(aucs.mean())
    half = float(t.ppf(0.975, count - 1) * aucs.std(ddof=1) / np.sqrt(count))
    return mean, (max(0.0, min(float(low), mean - half)), min(1.0, max(float(high), mean + half)))


def tpr_interval(
    members: ArrayLike,
    non_members: ArrayLike,
    fpr: float,
    seed: int = 0,
    groups: tuple[ArrayLike, ArrayLike] | None = None,
) -> Interval:
    """95 % interval of the TPR: union of Clopper-Pearson's and the bootstrap's (new thresholds)."""
    from scipy.stats import binomtest

    members, non_members = check_scores(members, non_members)
    boot = bootstrap(members, non_members, f"tpr@{fpr}", seed=seed, groups=groups)
    hits = round(tpr_at_fpr(members, non_members, fpr) * len(members))
    exact = binomtest(hits, len(members)).proportion_ci(method="exact")
    return min(boot[0], float(exact.low)), max(boot[1], float(exact.high))


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
    # Not by `size`: runs on the same pictures must draw alike whatever their ties.
    step = max(1, _CHUNK // (len(members) + len(non_members)))
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
    """(rows, size) counts of resampled positions: all rows at once, by `draw` where rng is None."""
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
