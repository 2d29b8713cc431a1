"""The blind control: tell members from non-members without ever asking the model.

It must come out at chance if the split is honest. If it does not, members and non-members differ
by themselves (another camera, another JPEG setting, another way of captioning), and an attack's
success says nothing about the model: Das, Zhang and Tramèr (2024, arXiv 2406.16201) beat published
attacks on eight public benchmarks this way.

Out-of-fold scores depend on one another through the shared training folds, so a Mann-Whitney test
on them calls an honest split dishonest up to ten times too often (6 of 60 at p < 0.01, 20 against
20). The p-value here is therefore a permutation's. That wants classifiers that refit in no time:
kernel ridge and power-weighted single features are both linear algebra over all label columns at
once, 500 refits in well under a second, where forests would take minutes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffward.errors import InputError
from diffward.membership.blind_features import blind_features, file_stats
from diffward.membership.statistics import CHANCE_MARGIN, CHANCE_P, ChanceCheck, auc

__all__ = ["blind_control", "blind_features", "blind_scores", "file_stats"]

Matrix = NDArray[np.float64]

RIDGE = 1.0
POWER = 4


def blind_scores(
    features: ArrayLike,
    labels: ArrayLike,
    seed: int = 0,
    folds: int = 5,
    groups: ArrayLike | None = None,
    repeats: int = 4,
) -> Matrix:
    """Out-of-fold scores (n,), higher = member, of two classifiers on `features` (n, d).

    Kernel ridge (diffuse shifts) and a sum of single features weighted by a power of their
    correlation with the label (one telling feature) are averaged as ranks *within each test fold*:
    pooling raw scores of different folds is biased below 0.5 on noise, because a fold that lost
    members makes a model that expects fewer. Averaged over `repeats` random fold assignments.
    Pictures that share a label in `groups` (near-duplicates, which the split keeps on one side)
    stay in one fold, or recognising the twin would pass for a shift.
    Raises InputError on fewer than 2 pictures (or groups) a side and on values that are not finite.
    """
    data, member, group = _check(features, labels, groups)
    return _scores(data, member[:, None].astype(np.float64), group, seed, folds, repeats)[:, 0]


def blind_control(
    features: ArrayLike,
    labels: ArrayLike,
    seed: int = 0,
    groups: ArrayLike | None = None,
    permutations: int = 499,
) -> tuple[Matrix, ChanceCheck]:
    """`blind_scores` and whether they are at chance, by the rule of `statistics.at_chance`.

    The p-value is that of permuting labels (of whole groups) over the same folds.
    """
    data, member, group = _check(features, labels, groups)
    rng = np.random.default_rng(seed)
    _, unit = np.unique(np.stack([group, member]), axis=1, return_inverse=True)
    unit = unit.ravel()
    unit_label = np.zeros(unit.max() + 1)
    unit_label[unit] = member
    columns = [member.astype(np.float64)]
    columns += [rng.permutation(unit_label)[unit] for _ in range(permutations)]
    scores = _scores(data, np.stack(columns, axis=1), group, seed)
    found = [auc(s[y > 0], s[y == 0]) for s, y in zip(scores.T, columns, strict=True) if _both(y)]
    distance = np.abs(np.array(found) - 0.5)
    p_value = float((distance >= distance[0] - 1e-12).mean())
    detectable = max(CHANCE_MARGIN, float(np.quantile(distance[1:], 1 - CHANCE_P)))
    ok = bool(p_value >= CHANCE_P or distance[0] < CHANCE_MARGIN)
    verdict = "at chance" if ok else "off chance"
    reason = (
        f"{verdict}: AUC {found[0]:.3f}, p = {p_value:.2g} by {permutations} permutations; "
        f"a distance from 0.5 below {detectable:.2f} would go unseen"
    )
    return scores[:, 0], ChanceCheck(ok, found[0], p_value, detectable, reason)


def _both(labels: Matrix) -> bool:
    """Whether there are at least 2 on each side (permuting groups of unequal size can break it)."""
    return 2 <= labels.sum() <= len(labels) - 2


def _check(
    features: ArrayLike, labels: ArrayLike, groups: ArrayLike | None
) -> tuple[Matrix, NDArray[np.bool_], NDArray[Any]]:
    """Normal scores of the features that vary, labels as bool, groups as numbers."""
    from scipy.stats import norm, rankdata

    data = np.asarray(features, dtype=np.float64)
    member = np.asarray(labels).astype(bool)
    if data.ndim != 2 or len(data) != len(member):
        raise InputError(f"features {data.shape} do not match {len(member)} labels")
    if not np.isfinite(data).all():
        raise InputError("blind features contain NaN or infinite values")
    group = np.arange(len(member)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if len(group) != len(member):
        raise InputError(f"{len(group)} groups for {len(member)} pictures")
    units = min(len(np.unique(group[member])), len(np.unique(group[~member])))
    if units < 2:
        raise InputError(
            "the blind control needs at least 2 members and 2 non-members that are not copies of "
            f"one another; one side has {units}"
        )
    data = data[:, np.ptp(data, axis=0) > 0]
    # Label-free, so it may use all pictures; ranks keep one outlier from ruling the kernel.
    normal = norm.ppf((rankdata(data, axis=0) - 0.5) / len(data))
    normal -= normal.mean(axis=0)
    return normal / np.maximum(normal.std(axis=0), 1e-12), member, group


def _scores(
    data: Matrix, labels: Matrix, group: NDArray[Any], seed: int, folds: int = 5, repeats: int = 4
) -> Matrix:
    """Out-of-fold scores (n, p) of each of the p label columns; folds do not depend on labels."""
    from scipy.stats import rankdata

    if data.shape[1] == 0:
        return np.full(labels.shape, 0.5)
    rng = np.random.default_rng(seed)
    kernel = data @ data.T / data.shape[1]
    # Squares see what is two-sided: members that are all neither dark nor bright.
    single = np.concatenate([data, data**2], axis=1)
    units = group.max() + 1
    total = np.zeros(labels.shape)
    for _ in range(repeats):
        fold = (rng.permutation(units) % min(folds, units))[group]
        for index in range(min(folds, units)):
            test, train = fold == index, fold != index
            for score in (
                _ridge(kernel[np.ix_(train, train)], kernel[np.ix_(test, train)], labels[train]),
                _power(single[train], single[test], labels[train]),
            ):
                total[test] += (rankdata(score, axis=0) - 0.5) / test.sum()
    return total / (2 * repeats)


def _ridge(train: Matrix, test: Matrix, labels: Matrix) -> Matrix:
    """Kernel ridge regression of centred labels (n, p): predictions (tests, p)."""
    centred = labels - labels.mean(axis=0)
    solved: Matrix = np.linalg.solve(train + RIDGE * np.eye(len(train)), centred)
    return test @ solved


def _power(train: Matrix, test: Matrix, labels: Matrix) -> Matrix:
    """Sum of standardised features weighted by sign(r) |r|^POWER, r the correlation with the label."""
    centre, spread = train.mean(axis=0), np.maximum(train.std(axis=0), 1e-9)
    centred = labels - labels.mean(axis=0)
    deviation = np.maximum(labels.std(axis=0), 1e-9)
    correlation = ((train - centre) / spread).T @ centred / (len(train) * deviation)
    weight = np.sign(correlation) * np.abs(correlation) ** POWER
    product: Matrix = np.clip((test - centre) / spread, -4, 4) @ weight
    return product
