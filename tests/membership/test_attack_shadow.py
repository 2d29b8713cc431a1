"""Shadow LoRAs: what is trained on what; the attacks against gains of known distribution."""

from __future__ import annotations

import numpy as np
import pytest

from diffward.errors import InputError
from diffward.membership.attack import ATTACKS, queries
from diffward.membership.attacks.calibrated import calibrated
from diffward.membership.attacks.lira import lira, lira_offline
from diffward.membership.attacks.rmia import rmia
from diffward.membership.bank import OFF, ON, bank_of_arrays
from diffward.membership.shadow import (
    Shadows,
    leave_one_out,
    role_swapped,
)
from diffward.membership.statistics import auc
from tests.membership.toy import binormal_auc

ONLINE = {"lira": lira, "rmia": rmia}
ALL = {**ONLINE, "lira_offline": lira_offline}


# --- attacks on gains of known distribution ----------------------------------------------------


def complementary(rng, count, n):
    first = [rng.permutation(n) < n // 2 for _ in range(count // 2)]
    return np.stack([half for h in first for half in (h, ~h)])


def gains(count, n, d, seed=0, varies=0.0, difficulty=3.0, target=None):
    """Gain of each picture: own difficulty + own effect of training (mean d) + standard normal noise.

    The target's effect is that of the shadows unless `target` says otherwise.
    """
    rng = np.random.default_rng(seed)
    inside, member = complementary(rng, count, n), rng.permutation(n) < n // 2
    effect = d + varies * rng.standard_normal(n)
    level = difficulty * rng.standard_normal(n)
    gain = level + effect * inside + rng.standard_normal((count, n))
    phi = level + (effect if target is None else target) * member + rng.standard_normal(n)
    return phi, member, Shadows(gain, inside)


def bank_of(phi, member, shadows, pairs=4, seed=0):
    """A bank whose gain has mean phi over the pairs; the base's errors are independent noise."""
    rng = np.random.default_rng([seed, 1])
    wiggle = rng.standard_normal((len(phi), pairs))
    wiggle -= wiggle.mean(axis=1, keepdims=True)
    off = 5 + rng.standard_normal((len(phi), pairs))
    answers = {("errors", ON): off - phi[:, None] - wiggle, ("errors", OFF): off}
    return bank_of_arrays(answers, member, shadows=shadows)


def mean_auc(attack, seeds=4, base=False, **how):
    found = []
    for seed in range(seeds):
        phi, member, shadows = gains(seed=seed, **how)
        bank = bank_of(phi, member, shadows, seed=seed)
        score = attack(bank.as_base() if base else bank)
        assert score.shape == (len(phi),) and score.dtype == np.float64
        assert np.isfinite(score).all()
        found.append(auc(score[member], score[~member]))
    return float(np.mean(found))


@pytest.mark.parametrize("count", [4, 8, 64])
@pytest.mark.parametrize("d", [1.0, 2.0])
def test_online_attacks_come_to_the_closed_form(count, d):
    """Middle of the two means known with variance 1 / S: d / sqrt(1 + 1 / S) standard deviations."""
    how = {"count": count, "n": 1000, "d": d}
    expected = binormal_auc(d / np.sqrt(1 + 1 / count))
    assert mean_auc(lira, **how) == pytest.approx(expected, abs=0.02)
    # The mean of exponentials is near the mean of gains, not equal to it.
    assert mean_auc(rmia, **how) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("count", [4, 8, 64])
@pytest.mark.parametrize("d", [-1.0, 1.0, 2.0])
def test_the_offline_attack_comes_to_the_closed_form(count, d):
    """mu_out has variance 2 / S."""
    found = mean_auc(lira_offline, count=count, n=1000, d=d)
    assert found == pytest.approx(binormal_auc(d / np.sqrt(1 + 2 / count)), abs=0.02)


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_they_beat_the_gain_alone(attack):
    how = {"count": 16, "n": 500, "d": 1.5, "varies": 0.5}
    assert mean_auc(attack, **how) > mean_auc(calibrated, **how) + 0.1


def test_lira_knows_on_which_pictures_training_tells():
    """Where its effect differs from picture to picture, mu_in is worth more than the out-models alone."""
    how = {"count": 32, "n": 800, "d": 1.0, "varies": 1.5}
    assert mean_auc(lira, **how) > mean_auc(lira_offline, **how) + 0.05


def test_lira_finds_a_sign_that_is_turned_around():
    assert mean_auc(lira, count=8, n=800, d=-1.5) > 0.75
    assert mean_auc(rmia, count=8, n=800, d=-1.5) < 0.25  # LR never asks for it


def test_lira_with_many_shadows_uses_each_pictures_spread():
    rng = np.random.default_rng(0)
    n, count = 800, 64
    inside, member = complementary(rng, count, n), rng.permutation(n) < n // 2
    spread = np.exp(rng.standard_normal(n))
    gain = 0.7 * inside + spread * rng.standard_normal((count, n))
    phi = 0.7 * member + spread * rng.standard_normal(n)
    own = lira(bank_of(phi, member, Shadows(gain, inside)))
    alike = gain.mean(0)  # what remains if all pictures had one spread: a difference of means
    common = phi - alike
    assert auc(own[member], own[~member]) > auc(common[member], common[~member]) + 0.02


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
@pytest.mark.parametrize("shadows_learn", [0.0, 2.0])
def test_chance_where_there_is_nothing(attack, shadows_learn):
    """Neither shadows that learned nothing nor a target that did gives anything away."""
    found = mean_auc(attack, count=8, n=1000, d=shadows_learn, target=0.0)
    assert found == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_the_base_is_at_chance(attack):
    assert mean_auc(attack, count=8, n=1000, d=2.0, base=True) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_a_target_trained_longer_than_its_shadows_is_no_less_a_member(attack):
    phi, member, shadows = gains(8, 400, 1.0, difficulty=0.0, target=20.0)
    score = attack(bank_of(phi, member, shadows))
    assert auc(score[member], score[~member]) > 0.99


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_units_and_difficulty_do_not_matter(attack):
    phi, member, shadows = gains(8, 200, 1.0)
    level = np.linspace(-1, 1, 200)
    moved = Shadows(1e-4 * (shadows.gain + level), shadows.inside)
    score = attack(bank_of(phi, member, shadows))
    again = attack(bank_of(1e-4 * (phi + level), member, moved))
    np.testing.assert_allclose(again, score, rtol=1e-5, atol=1e-6)
    assert len(set(score.tolist())) == 200  # no ties


def test_no_ties_however_sure():
    phi, member, shadows = gains(8, 300, 1.0, target=500.0)
    score = rmia(bank_of(phi, member, shadows))
    assert len(set(score.tolist())) == 300 and np.isfinite(score).all()


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_an_untrained_lora_gives_nothing_away(attack):
    member = np.arange(20) < 10
    shadows = Shadows(np.zeros((4, 20)), complementary(np.random.default_rng(0), 4, 20))
    off = np.random.default_rng(0).random((20, 4))
    score = attack(bank_of_arrays({("errors", m): off for m in (ON, OFF)}, member, shadows=shadows))
    assert not score.any()


def test_registered():
    layout = bank_of(*gains(4, 8, 0.0)).layout
    for name in ALL:
        entry = ATTACKS[name]
        assert entry.extra["needs"] == ("shadows",) and entry.extra["suite"] == "standard"
        assert queries(entry, layout) == 8
        assert "20" in entry.paper and entry.cost and entry.access


def test_what_cannot_be_judged():
    phi, member, shadows = gains(4, 12, 1.0)
    for attack in ALL.values():
        with pytest.raises(InputError, match="--shadows"):
            attack(bank_of(phi, member, None))
        with pytest.raises(InputError, match="know 12 pictures"):
            attack(bank_of(phi[:8], member[:8], shadows))
        with pytest.raises(InputError, match="train more"):
            attack(bank_of(phi, member, shadows.at(np.array([True, True, False, False]))))
    with pytest.raises(ValueError, match="do not match"):
        Shadows(shadows.gain, shadows.inside[:, 1:])


# --- the role swap -----------------------------------------------------------------------------


def test_leave_one_out_also_leaves_out_the_other_half():
    _, _, shadows = gains(8, 30, 1.0)
    for s in range(8):
        gain, member, rest = leave_one_out(shadows, s)
        assert np.array_equal(gain, shadows.gain[s]) and np.array_equal(member, shadows.inside[s])
        assert len(rest) == 6
        assert (rest.inside.sum(0) == 3).all()  # the counts do not tell members
    uneven = Shadows(shadows.gain[:7], shadows.inside[:7])
    assert len(leave_one_out(uneven, 6)[2]) == 6


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_role_swap_at_chance_and_at_the_closed_form(attack):
    for d in (0.0, 1.0):
        found = []
        for seed in range(3):
            for bank in role_swapped(gains(8, 500, d, seed=seed)[2]):
                score = attack(bank)
                found.append(auc(score[bank.is_member], score[~bank.is_member]))
        assert len(found) == 24
        lost = 2 / 6 if attack is lira_offline else 1 / 6
        expected = binormal_auc(d / np.sqrt(1 + lost))
        assert np.mean(found) == pytest.approx(expected, abs=0.015)


def test_role_swap_gives_other_attacks_their_errors():
    rng = np.random.default_rng(0)
    inside, base = complementary(rng, 6, 10), rng.random((10, 4))
    errors = base - rng.random((6, 10, 4))
    shadows = Shadows((base - errors).mean(2), inside, errors, base)
    for s, bank in enumerate(role_swapped(shadows, groups=np.arange(10))):
        np.testing.assert_allclose(calibrated(bank), shadows.gain[s])
        assert np.array_equal(bank.of("errors"), errors[s])
        assert bank.shadows.errors.shape == (4, 10, 4) and len(bank.groups) == 10
