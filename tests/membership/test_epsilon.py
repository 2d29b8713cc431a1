"""The bound on epsilon against the paper's figures, closed forms, mechanisms of known epsilon."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import binom

from diffward.errors import InputError
from diffward.membership.epsilon import (
    epsilon_lower_bound,
    epsilon_ruled_out,
    guessing_p_value,
)


def coins(m: int, seed: int) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng, rng.random(m) < 0.5


def randomized_response(epsilon: float, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, coins): each coin is told as it is with the odds e^epsilon to 1."""
    rng, included = coins(m, seed)
    told = included ^ (rng.random(m) > expit(epsilon))
    return told.astype(float), included


@pytest.mark.parametrize(
    ("m", "r", "correct", "delta", "printed"),
    # Appendix D and section 7 of the paper; it rounds the first and truncates the second.
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_papers_figures(m, r, correct, delta, printed):
    assert epsilon_ruled_out(m, r, correct, delta, 0.05) == pytest.approx(printed, abs=1e-3)


def test_perfect_guesses_match_the_closed_form():
    _, included = coins(1000, 0)
    score = included + 0.5 * np.random.default_rng(1).random(1000)
    # P[Binomial(r, q) = r] = q^r = 0.05; a few coins more than half are on one side.
    extra = abs(int(included.sum()) - 500)
    for r in (1000 - 2 * extra, 200, 201, 10):
        bound = epsilon_lower_bound(score, included, delta=0, guesses=[r])
        assert (bound.correct, bound.guesses, bound.canaries) == (r, r, 1000)
        assert bound.epsilon == pytest.approx(logit(0.05 ** (1 / r)))
    whole = epsilon_lower_bound(score, included, delta=0, guesses=[1000])
    q = expit(whole.epsilon)
    assert whole.correct == 1000 - extra
    assert binom.sf(whole.correct - 1, 1000, q) == pytest.approx(0.05)


def test_p_value_by_hand():
    # B ~ Binomial(2, 1/2): P[B >= 2] = 1/4, P[B = 1] = 1/2, P[0 <= B < 2] / 2 = 3/8.
    assert guessing_p_value(2, 2, 2, 0.0, 0.0) == pytest.approx(0.25)
    assert guessing_p_value(2, 2, 2, 0.0, 0.01) == pytest.approx(0.25 + 2 * 2 * 0.01 * 0.5)
    assert guessing_p_value(2, 2, 0, 0.0, 0.01) == 1.0
    rises = [guessing_p_value(50, 40, 30, epsilon, 1e-4) for epsilon in np.linspace(0, 3, 50)]
    assert (np.diff(rises) > 0).all()


def test_random_scores_prove_nothing():
    zero = []
    for seed in range(200):
        rng, included = coins(200, seed)
        zero.append(epsilon_lower_bound(rng.normal(size=200), included, delta=0).epsilon == 0)
    assert np.mean(zero) >= 0.95


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomized_response(epsilon):
    bounds = [
        epsilon_lower_bound(*randomized_response(epsilon, 400, seed), delta=0).epsilon
        for seed in range(200)
    ]
    assert np.mean(np.array(bounds) <= epsilon) >= 0.95
    # Some scores are tied across the middle, which costs more the less noise there is.
    large = epsilon_lower_bound(*randomized_response(epsilon, 20_000, 0), delta=1e-6)
    assert 0.6 * epsilon <= large.epsilon <= epsilon


def test_sparse_leak_wants_few_guesses():
    rng, included = coins(2000, 1)
    # One canary in ten is remembered.
    score = rng.normal(size=2000) + 6 * (included & (rng.random(2000) < 0.1))
    bound = epsilon_lower_bound(score, included)
    all_of_them = epsilon_lower_bound(score, included, guesses=[2000])
    assert bound.guesses < 1000 and bound.epsilon > all_of_them.epsilon


def test_monotone():
    scores, included = randomized_response(2.0, 500, 3)
    deltas = [epsilon_lower_bound(scores, included, delta=d).epsilon for d in (0, 1e-6, 1e-4, 1e-2)]
    assert deltas[0] > deltas[1] > deltas[2] > deltas[3] == 0
    sure = [
        epsilon_lower_bound(scores, included, confidence=c).epsilon for c in (0.5, 0.9, 0.95, 0.999)
    ]
    assert sure == sorted(sure, reverse=True)
    found = [epsilon_ruled_out(500, 100, correct, 1e-5, 0.05) for correct in range(101)]
    assert found == sorted(found) and found[50] == 0


def test_several_numbers_of_guesses_share_the_risk():
    scores, included = randomized_response(2.0, 500, 4)
    one = epsilon_lower_bound(scores, included, guesses=[500])
    same = epsilon_lower_bound(scores, included, guesses=[500, 500])
    halved = epsilon_lower_bound(scores, included, guesses=[500], confidence=0.975)
    two = epsilon_lower_bound(scores, included, guesses=[500, 20])
    assert one == same
    assert two.guesses == 500 and two.epsilon == halved.epsilon < one.epsilon
    assert two.confidence == 0.95 and asdict(two)["canaries"] == 500


def test_order_of_the_pictures_gives_nothing_away():
    # Members first, as audits list them, and a score that is the same for all.
    included = np.arange(400) < 200
    assert epsilon_lower_bound(np.zeros(400), included).epsilon == 0
    assert epsilon_lower_bound(-included.astype(float), included).epsilon == 0


def test_few_canaries():
    assert epsilon_lower_bound([1.0], [True]).epsilon == 0
    for m in (1, 4, 9, 10, 40, 400):
        bound = epsilon_lower_bound(np.arange(m), coins(m, 0)[1], delta=0)
        assert bound.canaries == m and 1 <= bound.guesses <= m


def test_bad_input_is_one_line():
    scores, included = randomized_response(1.0, 100, 5)
    for arguments, options, what in (
        ((scores[:50], included), {}, "do not match coins"),
        (([], []), {}, "do not match coins"),
        ((np.where(included, np.nan, 0), included), {}, "NaN or infinite"),
        ((scores, included), {"delta": -1e-5}, "between 0 and 1"),
        ((scores, included), {"confidence": 1.0}, "between 0 and 1"),
        ((scores, included), {"guesses": [0]}, "from 1 to the 100"),
        ((scores, included), {"guesses": [101]}, "from 1 to the 100"),
        ((scores, included), {"guesses": []}, "from 1 to the 100"),
        ((scores, np.arange(100) < 80), {}, "80 of 100 canaries .* no fair coin"),
    ):
        with pytest.raises(InputError, match=what) as error:
            epsilon_lower_bound(*arguments, **options)
        assert "\n" not in str(error.value)
