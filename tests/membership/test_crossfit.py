"""Cross-fitting: at chance on noise, blind to a picture's own label, as good as Bayes allows."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from diffward.errors import InputError
from diffward.membership.crossfit import boosting, crossfit, crossfit_inflation, logistic
from diffward.membership.statistics import (
    at_chance,
    auc,
    auc_interval,
    membership_p_value,
    newcombe_ci,
    widened,
)


def halves(n: int, rng: np.random.Generator, share: float = 0.5) -> np.ndarray:
    member = np.zeros(n, bool)
    member[rng.permutation(n)[: round(share * n)]] = True
    return member


@cache
def noise(n: int, d: int, seeds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(members, non-members) scores of `seeds` cross-fits of logistic regression on pure noise."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng([n, d, seed])
        member = halves(n, rng)
        scores = crossfit(rng.normal(size=(n, d)), member, logistic(), seed=seed)
        found.append((scores[member], scores[~member]))
    return found


@pytest.mark.parametrize(
    ("n", "d", "seeds"),
    [
        *[(40, 1, 1200), (40, 5, 500), (40, 30, 400)],
        *[(100, 1, 400), (100, 5, 400), (100, 30, 200)],
        *[(400, 1, 200), (400, 5, 200), (400, 30, 200)],
    ],
)
def test_noise_is_at_chance_on_average(n, d, seeds):
    values = [auc(*sides) for sides in noise(n, d, seeds)]
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)


def test_unequal_classes_and_skewed_noise_are_at_chance():
    values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        member = halves(60, rng, share=0.25)
        scores = crossfit(rng.exponential(size=(60, 5)), member, logistic(), seed=seed, repeats=1)
        values.append(auc(scores[member], scores[~member]))
    assert np.mean(values) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("share", [0.5, 0.2])
@pytest.mark.parametrize("d", [1, 5])
def test_perfect_separation_stays_perfect(d, share):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        member = halves(40, rng, share)
        features = rng.normal(size=(40, d)) + 8 * member[:, None]
        scores = crossfit(features, member, logistic(), seed=seed)
        assert scores[member].min() > scores[~member].max()
    scores = crossfit(features, member, boosting(), repeats=1)
    assert scores[member].min() > scores[~member].max()


@pytest.mark.parametrize("fit", [logistic(), boosting()], ids=["logistic", "boosting"])
def test_own_label_has_no_say(fit):
    rng = np.random.default_rng(0)
    n = 24
    features, member = rng.normal(size=(n, 3)), halves(n, rng, 0.4)
    groups = np.r_[np.arange(n - 6), [0, 0, 1, 2, 3, 3]]

    def scored(labels: np.ndarray) -> np.ndarray:
        return crossfit(features, labels, fit, groups=groups, folds=3, repeats=1, seed=5)

    before = scored(member)
    for i in range(n):
        flipped = member.copy()
        flipped[i] = ~flipped[i]
        after = scored(flipped)
        mates = groups == groups[i]
        assert (after[mates] == before[mates]).all()
        assert (after != before).any()


def test_twins_teach_nothing_about_one_another():
    # 30 pairs of copies, one label a pair: recognising the copy would give AUC 1.
    rng = np.random.default_rng(1)
    features = np.repeat(rng.normal(size=(30, 60)), 2, axis=0)
    member = np.repeat(halves(30, rng), 2)
    leaky = crossfit(features, member, logistic(C=10.0))
    honest = crossfit(features, member, logistic(C=10.0), groups=np.repeat(np.arange(30), 2))
    assert auc(leaky[member], leaky[~member]) > 0.9
    assert 0.2 < auc(honest[member], honest[~member]) < 0.8


@pytest.mark.parametrize("d", [1, 6])
def test_reaches_the_bayes_auc(d):
    rng = np.random.default_rng(2)
    member = halves(1500, rng)
    shift = rng.normal(size=d)
    shift *= np.sqrt(2) * norm.ppf(0.75) / np.linalg.norm(shift)
    features = rng.normal(size=(1500, d)) + member[:, None] * shift
    scores = crossfit(features, member, logistic())
    # What the true direction reaches on these pictures; its own standard error is 0.012.
    best = features @ shift
    assert auc(best[member], best[~member]) == pytest.approx(0.75, abs=0.04)
    assert auc(scores[member], scores[~member]) > auc(best[member], best[~member]) - 0.012


def test_boosting_sees_what_interacts():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(400, 2))
    member = (features.prod(axis=1) > 0) ^ (rng.random(400) < 0.1)
    values = [
        auc(scores[member], scores[~member])
        for fit in (logistic(), boosting())
        for scores in [crossfit(features, member, fit, repeats=1)]
    ]
    assert values[0] < 0.62 and values[1] > 0.8


@pytest.mark.parametrize(
    ("n", "d", "C", "apart"), [(40, 3, 0.1, 0), (30, 50, 0.1, 0), (80, 4, 100.0, 5), (9, 1, 1e4, 9)]
)
def test_logistic_is_that_of_sklearn(n, d, C, apart):
    rng = np.random.default_rng(n)
    member = np.arange(n) < n // 3
    features = 3 * rng.normal(size=(n, d)) + 7
    features[member, 0] += apart
    mine = logistic(C)(np.c_[features, np.ones(n)], member)(np.c_[features, np.zeros(n)])
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    theirs = LogisticRegression(C=C, class_weight="balanced", tol=1e-10, max_iter=10_000)
    assert mine == pytest.approx(theirs.fit(scaled, member).decision_function(scaled), abs=1e-4)


def test_a_class_that_is_not_there_scores_zero():
    rng = np.random.default_rng(4)
    features, member = rng.normal(size=(10, 2)), np.arange(10) == 0
    assert (crossfit(features, np.zeros(10), logistic()) == 0).all()
    scores = crossfit(features, member, logistic(), folds=2, repeats=1)
    # The fold with the only member has nothing to learn from.
    assert scores[0] == 0 and 0 < (scores != 0).sum() < 10
    assert (crossfit(np.ones((10, 2)), rng.random(10) < 0.5, logistic()) == 0).all()
    assert (crossfit(features, rng.random(10) < 0.5, logistic(), groups=np.zeros(10)) == 0).all()


def test_bad_input_is_one_line():
    good, member = np.zeros((6, 2)), np.arange(6) < 3
    for features, labels, options, what in (
        (good, member[:5], {}, "do not match"),
        (good[:, 0], member, {}, "do not match"),
        (np.full((6, 2), np.nan), member, {}, "6 of 6 pictures are NaN"),
        (good, member, {"groups": [0, 1]}, "2 groups for 6"),
        (good, member, {"folds": 1}, "1 folds"),
    ):
        with pytest.raises(InputError, match=what):
            crossfit(features, labels, logistic(), **options)
    with pytest.raises(InputError, match="1 pictures"):
        crossfit_inflation(1)


def test_inflation_restores_the_error_rate():
    inflation = crossfit_inflation(100)
    sides = noise(100, 5, 400)
    values = np.array([auc(*pair) for pair in sides])
    # The documented spread, over that of Mann and Whitney.
    assert 1.25 < values.std() / np.sqrt(101 / (12 * 50 * 50)) < inflation
    without = np.mean([membership_p_value(*pair) < 0.05 for pair in sides])
    with_it = np.mean([membership_p_value(*pair, inflation=inflation) < 0.05 for pair in sides])
    assert without > 0.1 and with_it <= 0.05
    off = [not at_chance(*pair, inflation=inflation).ok for pair in sides]
    assert np.mean(off) <= 0.015
    missed = [
        not low <= 0.5 <= high
        for value in values
        for low, high in [widened(value, newcombe_ci(value, 50, 50), inflation)]
    ]
    assert np.mean(missed) <= 0.05
    narrow, wide = auc_interval(*sides[0]), auc_interval(*sides[0], inflation=inflation)
    assert np.diff(wide) == pytest.approx(inflation * np.diff(narrow))
