"""The statistics against known truths: the binormal toy, scipy, scikit-learn, hand-made cases."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score

from diffward.errors import InputError
from diffward.membership import statistics as st


def toy(true_auc: float, n: int, seed: int, m: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Members N(d, 1), non-members N(0, 1); AUC = Phi(d / sqrt 2)."""
    rng = np.random.default_rng(seed)
    shift = np.sqrt(2) * norm.ppf(true_auc)
    return rng.normal(shift, 1, m or n), rng.normal(0, 1, n)


@pytest.mark.parametrize("true_auc", [0.5, 0.75, 0.95])
def test_auc_of_the_binormal_toy(true_auc):
    members, others = toy(true_auc, 20_000, seed=1)
    assert st.auc(members, others) == pytest.approx(true_auc, abs=0.008)


def test_higher_means_member():
    assert st.auc([3, 4], [1, 2]) == 1.0
    assert st.auc([1, 2], [3, 4]) == 0.0
    assert st.auc_signfree([1, 2], [3, 4]) == 1.0
    assert st.tpr_at_fpr([3, 4], [1, 2], 0.1) == 1.0
    assert st.tpr_at_fpr([1, 2], [3, 4], 0.1) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scipy_and_sklearn_on_ties(seed):
    rng = np.random.default_rng(seed)
    members, others = rng.integers(0, 6, 37).astype(float), rng.integers(0, 5, 53).astype(float)
    truth = np.r_[np.ones(37), np.zeros(53)]
    value = st.auc(members, others)
    assert value == pytest.approx(roc_auc_score(truth, np.r_[members, others]))
    assert value == pytest.approx(mannwhitneyu(members, others).statistic / (37 * 53))
    fpr, tpr = st.roc_curve(members, others)
    assert value == pytest.approx(np.trapezoid(tpr, fpr))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)


def test_tpr_is_conservative():
    others = np.arange(100.0)
    # 5 of 100 non-members may pass, 95 to 99: 93.5 would let 94 in as well.
    assert st.tpr_at_fpr([93.5, 94.5, 99.5, 10.0], others, 0.05) == 0.5
    # A tie at the threshold that would let 6 through is not used.
    tied = np.r_[np.arange(94.0), np.full(6, 200.0)]
    assert st.tpr_at_fpr([200.0, 201.0], tied, 0.05) == 0.5
    members, non = toy(0.75, 40_000, seed=3)
    expected = 1 - norm.cdf(norm.ppf(0.95) - np.sqrt(2) * norm.ppf(0.75))
    assert st.tpr_at_fpr(members, non, 0.05) == pytest.approx(expected, abs=0.01)


def test_all_equal_is_chance():
    figures = st.summarise([1.0] * 30, [1.0] * 30)
    assert figures["auc"] == 0.5 and figures["tpr_at_fpr"]["0.05"] == 0.0
    low, high = figures["auc_ci95"]
    assert low < 0.45 and high > 0.55
    assert st.at_chance([1.0] * 30, [1.0] * 30).ok


def test_perfect_separation_of_five_is_not_certain():
    assert st.bootstrap(np.arange(5.0) + 10, np.arange(5.0)) == (1.0, 1.0)
    low, high = st.auc_interval(np.arange(5.0) + 10, np.arange(5.0))
    assert 0.5 < low < 0.75 and high == 1.0
    low, high = st.auc_interval(np.arange(5.0), np.arange(5.0) + 10)
    assert low == 0.0 and 0.25 < high < 0.5
    low, _ = st.tpr_interval(np.arange(10.0) + 50, np.arange(20.0), 0.05)
    assert low < 0.75


def test_newcombe_is_symmetric_and_narrows():
    low, high = st.newcombe_ci(0.8, 30, 50)
    mirrored = st.newcombe_ci(0.2, 30, 50)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)
    assert st.newcombe_ci(0.8, 3000, 5000) == pytest.approx((0.79, 0.81), abs=0.003)


@pytest.mark.parametrize("true_auc", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("n", [20, 100])
def test_intervals_cover(true_auc, n):
    intervals = np.array([st.auc_interval(*toy(true_auc, n, seed=seed)) for seed in range(200)])
    covered = ((intervals[:, 0] <= true_auc) & (true_auc <= intervals[:, 1])).mean()
    # The union is conservative near 1 (99.3 % at n = 20, AUC 0.95 over 1,500 runs), never short,
    # and not so wide as to say nothing.
    assert covered >= 0.92
    assert np.diff(intervals).mean() < (0.4 if n == 20 else 0.18)


def test_interval_covers_unequal_spread_and_sizes():
    # Newcombe's alone covers 86 % here, the bootstrap's alone 69 % at AUC 0.95.
    for true_auc in (0.5, 0.95):
        shift = norm.ppf(true_auc) * np.sqrt(1 + 0.3**2)
        covered = 0
        for seed in range(200):
            rng = np.random.default_rng(seed)
            low, high = st.auc_interval(rng.normal(shift, 0.3, 60), rng.normal(0, 1, 16))
            covered += low <= true_auc <= high
        assert covered >= 0.9 * 200


def test_delong_matches_the_bootstrap():
    members, others = toy(0.75, 400, seed=5, m=300)
    assert st.delong_ci(members, others) == pytest.approx(st.bootstrap(members, others), abs=0.006)


def test_vectorised_bootstrap_equals_the_plain_loop():
    members, others = toy(0.7, 40, seed=2, m=30)
    for name, function in (("auc", st.auc), ("tpr@0.1", lambda a, b: st.tpr_at_fpr(a, b, 0.1))):
        fast = st.bootstrap(members, others, name, n_boot=4000, seed=1)
        slow = st.bootstrap(members, others, function, n_boot=1500, seed=2)
        assert fast == pytest.approx(slow, abs=0.04)


def test_groups_widen_the_interval():
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(10), 20)
    members = np.repeat(rng.normal(1, 1, 10), 20) + rng.normal(0, 0.1, 200)
    others = np.repeat(rng.normal(0, 1, 10), 20) + rng.normal(0, 0.1, 200)
    single = st.bootstrap(members, others)
    grouped = st.bootstrap(members, others, groups=(person, person))
    assert grouped[1] - grouped[0] > 2 * (single[1] - single[0])
    with pytest.raises(InputError, match="group labels"):
        st.bootstrap(members, others, groups=(person[:5], person))


def test_bootstrap_is_fast_and_seeded():
    members, others = toy(0.7, 500, seed=4)
    start = time.perf_counter()
    first = st.bootstrap(members, others, seed=7)
    assert time.perf_counter() - start < 2.0
    assert first == st.bootstrap(members, others, seed=7)
    assert first != st.bootstrap(members, others, seed=8)


def test_signfree_interval():
    assert st.signfree_interval((0.4, 0.7)) == (0.5, 0.7)
    assert st.signfree_interval((0.6, 0.7)) == (0.6, 0.7)
    assert st.signfree_interval((0.1, 0.3)) == (0.7, 0.9)


@pytest.mark.parametrize(
    ("n", "given"), [(5, []), (10, ["0.1"]), (20, ["0.05", "0.1"]), (1000, ["0.01", "0.05", "0.1"])]
)
def test_tpr_only_where_the_grid_is_fine_enough(n, given):
    figures = st.summarise(*toy(0.8, n, seed=0, m=30))
    assert [key for key, value in figures["tpr_at_fpr"].items() if value is not None] == given
    assert set(figures["tpr_at_fpr_reason"]) == {"0.01", "0.05", "0.1"} - set(given)
    assert figures["n_non_members"] == n and figures["n_members"] == 30
    assert figures["auc_ci95"][0] <= figures["auc"] <= figures["auc_ci95"][1]
    json.dumps(figures, allow_nan=False)


def test_degenerate_input_is_named():
    with pytest.raises(InputError, match="1 members"):
        st.auc([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="0 non-members"):
        st.summarise([1.0, 2.0], [])
    with pytest.raises(InputError, match="2 of 3 scores of members"):
        st.auc([np.nan, np.nan, 1.0], [1.0, 2.0])


def test_p_values():
    member = np.array([True, False, False, False])
    values = st.p_values([9.0, 1.0, 2.0, 3.0], member)
    assert values == pytest.approx([1 / 4, 1, 2 / 3, 1 / 3])


def test_at_chance():
    assert st.at_chance(*toy(0.5, 200, seed=1)).ok
    shifted = st.at_chance(*toy(0.8, 200, seed=1))
    assert not shifted.ok and "off chance" in shifted.reason
    assert not st.at_chance(*toy(0.2, 200, seed=1)).ok
    trivial = st.at_chance(*toy(0.52, 20_000, seed=1))
    assert trivial.ok and trivial.p_value < 0.01
    few = st.at_chance([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert few.ok and few.detectable > 0.4 and "unseen" in few.reason


def test_an_honest_control_rarely_fails():
    failed = sum(not st.at_chance(*toy(0.5, 60, seed=seed)).ok for seed in range(500))
    assert failed <= 12
