"""The statistics against known truths: the binormal toy, scipy, scikit-learn, hand-made cases."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from scipy.stats import ks_2samp, mannwhitneyu, norm
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


def test_a_family_of_controls_rarely_fails():
    # Audits of 20 controls at chance each; without the family one in six would fail.
    audits = 100
    off = [
        [not st.at_chance(*toy(0.5, 40, seed=1000 * audit + k), family=20).ok for k in range(20)]
        for audit in range(audits)
    ]
    assert np.any(off, axis=1).sum() <= 3
    alone = st.at_chance(*toy(0.66, 60, seed=0))
    one_of_many = st.at_chance(*toy(0.66, 60, seed=0), family=20)
    assert 0.0005 < alone.p_value == one_of_many.p_value < 0.01
    assert not alone.ok and one_of_many.ok and one_of_many.detectable > alone.detectable
    assert "one of 20 controls: below 0.0005 counts" in one_of_many.reason
    assert not st.at_chance(*toy(0.9, 60, seed=4), family=20).ok
    with pytest.raises(InputError, match="family of 0"):
        st.at_chance(*toy(0.5, 20, seed=0), family=0)


def test_membership_p_value():
    members, others = toy(0.7, 30, seed=1)
    assert st.membership_p_value(members, others) == mannwhitneyu(members, others).pvalue
    assert st.membership_p_value(others, members) == st.membership_p_value(members, others)
    z = norm.isf(st.membership_p_value(members, others) / 2)
    wide = st.membership_p_value(members, others, inflation=1.5)
    assert norm.isf(wide / 2) == pytest.approx(z / 1.5)
    assert st.membership_p_value([1.0, 1.0], [1.0, 1.0], inflation=2.0) == 1.0
    assert st.membership_p_value(np.arange(2000.0) + 1e4, np.arange(2000.0), inflation=1.5) < 1e-99
    with pytest.raises(InputError, match=r"inflation 0\.9"):
        st.membership_p_value(members, others, inflation=0.9)


def test_holm():
    assert st.holm({"b": 0.04, "a": 0.01, "c": 0.03}) == pytest.approx(
        {"b": 0.06, "a": 0.03, "c": 0.06}
    )
    assert list(st.holm({"b": 0.04, "a": 0.01})) == ["b", "a"]
    assert st.holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert st.holm({"a": 0.02}) == {"a": 0.02} and st.holm({}) == {}
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(InputError, match="p-value of x"):
            st.holm({"x": bad})
    # The error of a family of 10, two of them strongly dependent.
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        p = rng.random(10)
        p[1] = p[0]
        wrong += min(st.holm({str(i): v for i, v in enumerate(p)}).values()) < 0.05
    assert 0.03 < wrong / 2000 < 0.06


def test_frozen_threshold_by_hand():
    # k = floor(0.1 * 20) = 2: the second highest of 19 calibration scores, to be exceeded.
    figures = st.tpr_at_frozen_threshold(
        np.arange(19.0), [17.0, 17.5, 18, 30], [0.0, 1, 2, 17.2], 0.1
    )
    assert figures["threshold"] == 17.0 and figures["n_calibration"] == 19
    assert (figures["tpr"], figures["fpr"]) == (0.75, 0.25)
    assert figures["tpr_ci95"] == pytest.approx([0.1941, 0.9937], abs=1e-4)
    with pytest.raises(InputError, match="at least 19 calibration non-members; there are 18"):
        st.tpr_at_frozen_threshold(np.arange(18.0), [1.0, 2], [1.0, 2], 0.05)
    with pytest.raises(InputError, match="between 0 and 1"):
        st.tpr_at_frozen_threshold(np.arange(18.0), [1.0, 2], [1.0, 2], 1.0)


def test_frozen_threshold_keeps_its_word():
    """Realised FPR at most 5 % on average; intervals that cover the truth of their threshold."""
    rng = np.random.default_rng(0)
    realised, covered = [], 0
    for _ in range(400):
        figures = st.tpr_at_frozen_threshold(
            rng.normal(size=30), rng.normal(1, 1, 40), rng.normal(size=30), 0.05
        )
        realised.append(figures["fpr"])
        low, high = figures["tpr_ci95"]
        covered += low <= norm.sf(figures["threshold"] - 1) <= high
    # floor(0.05 * 31) / 31
    assert np.mean(realised) == pytest.approx(1 / 31, abs=0.006)
    assert covered >= 0.95 * 400


@pytest.mark.parametrize(
    ("n", "given"), [(17, []), (18, ["0.1"]), (37, ["0.1"]), (38, ["0.05", "0.1"])]
)
def test_summarise_freezes_a_threshold_on_half_of_the_non_members(n, given):
    members, others = toy(0.8, n, seed=1, m=25)
    figures = st.summarise(members, others, seed=3)
    assert [key for key, value in figures["frozen"].items() if value is not None] == given
    assert set(figures["frozen_reason"]) == {"0.05", "0.1"} - set(given)
    if not given:
        assert (
            f"needs at least 18 non-members, half of them to set the threshold; there are {n}"
            in (figures["frozen_reason"]["0.1"])
        )
        return
    frozen = figures["frozen"]["0.1"]
    assert frozen["n_calibration"] == n // 2
    # Which half does not depend on any score, and another seed takes another.
    moved = st.summarise(members + 5, others, seed=3)["frozen"]["0.1"]
    assert moved["threshold"] == frozen["threshold"]
    thresholds = {
        st.summarise(members, others, seed=s)["frozen"]["0.1"]["threshold"] for s in range(12)
    }
    assert len(thresholds) > 1


def test_summarise_adds_delong_and_advantage():
    members, others = toy(0.75, 60, seed=2, m=50)
    figures = st.summarise(members, others)
    assert figures["auc_delong_ci95"] == list(st.delong_ci(members, others))
    assert figures["advantage"] == pytest.approx(ks_2samp(members, others).statistic)
    assert st.advantage(-members, -others) == pytest.approx(figures["advantage"])
    assert figures["inflation"] == 1.0
    grouped = st.summarise(members, others, groups=(np.arange(50) // 2, np.arange(60) // 2))
    assert grouped["frozen"] == {"0.05": None, "0.1": None}
    json.dumps(grouped, allow_nan=False)


def test_inflation_widens_the_intervals_of_the_auc_only():
    members, others = toy(0.7, 60, seed=2)
    plain, wide = st.summarise(members, others), st.summarise(members, others, inflation=1.5)
    for key in ("auc_ci95", "auc_delong_ci95"):
        assert np.diff(wide[key]) == pytest.approx(1.5 * np.diff(plain[key]))
    assert wide["auc_signfree_ci95"] == list(st.signfree_interval(tuple(wide["auc_ci95"])))
    same = ("auc", "tpr_at_fpr_ci95", "frozen", "advantage")
    assert [wide[key] for key in same] == [plain[key] for key in same]
    edge = st.summarise(np.arange(10.0) + 20, np.arange(10.0), inflation=3.0)
    assert 0 <= edge["auc_ci95"][0] < 0.6 and edge["auc_ci95"][1] == 1.0
    with pytest.raises(InputError, match="inflation"):
        st.summarise(members, others, inflation=float("nan"))


def training_runs(count: int, spread: float, seed: int, n: int = 40) -> list[tuple]:
    """Runs with their own pictures; d' ~ N(1, spread), so the mean AUC is Phi(1 / sqrt(2 + s²))."""
    rng = np.random.default_rng(seed)
    shifts = rng.normal(1, spread, count)
    return [(rng.normal(shift, 1, n), rng.normal(0, 1, n)) for shift in shifts]


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_cluster_interval_covers(count, spread):
    truth = norm.cdf(1 / np.sqrt(2 + spread**2))
    covered = 0
    for seed in range(100):
        runs = training_runs(count, spread, seed)
        mean, (low, high) = st.cluster_interval(runs, n_boot=200, seed=seed)
        assert mean == pytest.approx(np.mean([st.auc(*run) for run in runs]))
        assert low <= mean <= high
        covered += low <= truth <= high
    assert covered >= 92


def test_cluster_interval_of_shared_pictures():
    # Five runs that say the same of the same pictures are no more than one.
    one = training_runs(1, 0.0, seed=1)
    _, alone = st.cluster_interval(one * 5)
    _, shared = st.cluster_interval(one * 5, shared=True)
    assert shared == pytest.approx(st.bootstrap(*one[0]), abs=0.01)
    assert np.diff(shared) > 1.5 * np.diff(alone)
    assert st.cluster_interval(one * 5) == st.cluster_interval(one * 5)
    with pytest.raises(InputError, match="1 training runs"):
        st.cluster_interval(one)
    with pytest.raises(InputError, match="as many scores"):
        st.cluster_interval([one[0], (one[0][0][:9], one[0][1])], shared=True)
