"""Captions cut by importance; CLiD, quantile, CDI and adaptive on answers of known AUC; dataset inference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind

from diffward.errors import InputError
from diffward.lora import LoraModule, LoraWeights
from diffward.membership.attack import ATTACKS, queries
from diffward.membership.attacks.adaptive import adaptive, adaptive_features
from diffward.membership.attacks.calibrated import calibrated
from diffward.membership.attacks.cdi import cdi, cdi_features
from diffward.membership.attacks.clid import ALPHA, clid, clid_vec, robust
from diffward.membership.attacks.loss import loss_mc
from diffward.membership.attacks.quantile import LEVELS, below_quantiles, quantile, quantile_line
from diffward.membership.bank import OFF, ON, Layout, Pairs, bank_of_arrays, build_bank
from diffward.membership.captions import SHARES, reduced_captions
from diffward.membership.crossfit import crossfit, logistic
from diffward.membership.dataset_inference import RESAMPLES, dataset_inference
from diffward.membership.features import binned, discrepancies
from diffward.membership.statistics import auc
from diffward.models.features import encode_pictures
from tests.membership.toy import binormal_auc

K = 16
PAD = "<|endoftext|>"


def sides(n, seed):
    rng = np.random.default_rng(seed)
    return rng, rng.permutation(n) < n // 2


def auc_of(scores, member):
    assert scores.shape == member.shape and scores.dtype == np.float64
    return auc(scores[member], scores[~member])


# --- captions ----------------------------------------------------------------------------------


def test_the_most_telling_words_become_padding(denoiser):
    """Against a loop word by word, through the encoder's own pooled output."""
    captions = ["a red cup", "sks dog", "", "logo", "b a c d", "  a   red cup ", "a red cup"]

    def summary(text):
        ids = denoiser.tokenizer(
            text, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return denoiser.text_encoder(ids).pooler_output[0]

    reduced = reduced_captions(denoiser, captions)
    assert len(reduced) == len(SHARES) and all(len(texts) == len(captions) for texts in reduced)
    for n, caption in enumerate(captions):
        words = caption.split()
        with torch.no_grad():
            whole = summary(" ".join(words))
            moved = [
                float((summary(" ".join(words[:i] + words[i + 1 :])) - whole).norm())
                for i in range(len(words))
            ]
        for share, texts in zip(SHARES, reduced, strict=True):
            count = {0.3: [0, 1, 1, 1, 2], 0.5: [0, 1, 1, 2, 2], 0.7: [0, 1, 2, 3, 3]}[share]
            gone = set(sorted(range(len(words)), key=lambda i: -moved[i])[: count[len(words)]])
            left = [PAD if i in gone else word for i, word in enumerate(words)]
            assert texts[n].split() == ([] if len(gone) == len(words) else left)
    assert [texts[2] for texts in reduced] == [texts[3] for texts in reduced] == [""] * len(SHARES)


def test_padding_keeps_the_other_words_in_their_places(denoiser):
    ids = denoiser.tokenize([f"a {PAD} cup", "a a cup", PAD, ""])
    end = denoiser.tokenizer.eos_token_id
    assert ids[0, 2] == end and (ids[0] == ids[1]).sum() == ids.shape[1] - 1
    assert (ids[2] == ids[3]).all()


def lora(denoiser, text_encoder):
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, shape in denoiser.module_shapes().items():
        if name.endswith("to_q") or (text_encoder and name.endswith("q_proj")):
            down = torch.randn(2, shape[1], generator=generator)
            up = 0.3 * torch.randn(shape[0], 2, generator=generator)
            modules[name] = LoraModule.of(name, down, up, 2.0)
    return LoraWeights(modules)


@pytest.mark.parametrize("prediction, text_encoder", [("epsilon", True), ("v_prediction", False)])
def test_errors_under_cut_captions_are_the_loop(tiny_denoiser, pictures, prediction, text_encoder):
    """Words are ranked by the base, also for an adapter on the text encoder; whatever the batch."""
    denoiser = tiny_denoiser(prediction)
    features = encode_pictures(denoiser, pictures, cache=False)
    reduced = reduced_captions(denoiser, features.captions)
    denoiser.attach(lora(denoiser, text_encoder))
    assert reduced_captions(denoiser, features.captions) == reduced
    pairs = Pairs.draw(denoiser, 2, seed=2)
    middle = Layout.of_pairs(pairs).middle
    member = np.array([True, False] * 3)
    banks = [build_bank(denoiser, features, pictures, member, pairs, batch=b) for b in (3, 64)]
    for model in (ON, OFF):
        for probe, texts in (("errors_null", [[""] * 6]), ("errors_reduced", reduced)):
            expected = np.zeros((6, len(texts), len(middle)))
            with torch.no_grad(), denoiser.adapter(model == ON):
                for n, row in enumerate(texts):
                    for i, caption in enumerate(row):
                        text = denoiser.condition([caption])
                        for j, k in enumerate(middle):
                            parts = features.latents[i][None], pairs.t[[k]], pairs.eps[[k]]
                            expected[i, n, j] = float(denoiser.errors(*parts, text).mean())
            for bank in banks:
                answer = bank.of(probe, model).reshape(expected.shape)
                np.testing.assert_allclose(answer, expected, rtol=2e-5)


def test_words_are_ranked_once_for_all_shares(denoiser, pictures, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "diffward.membership.captions.reduced_captions",
        lambda d, captions: calls.append(1) or reduced_captions(d, captions),
    )
    features = encode_pictures(denoiser, pictures, cache=False)
    denoiser.attach(lora(denoiser, False))
    bank = build_bank(denoiser, features, pictures, np.arange(6) < 3, Pairs.draw(denoiser, 4))
    bank.of("errors_reduced", ON), bank.of("errors_reduced", OFF)
    assert len(calls) == 1


# --- CLiD --------------------------------------------------------------------------------------


def clid_bank(n, shift, likelihood, seed=0):
    """D_i of unit spread whose mean is `shift` apart, and L that is `likelihood` apart."""
    rng, member = sides(n, seed)
    own = 5 - likelihood * member + rng.standard_normal(n)
    rise = rng.standard_normal((n, 4)) + np.multiply.outer(member, shift)
    at = Layout.of(K, np.arange(K)).middle
    errors = 100 + rng.standard_normal((n, K))  # pairs away from the middle are not to count
    errors[:, at] = own[:, None]
    other = (own[:, None] + rise)[:, :, None].repeat(len(at), axis=2)
    answers = {
        ("errors", ON): errors,
        ("errors_reduced", ON): other[:, :3],
        ("errors_null", ON): other[:, 3],
    }
    return bank_of_arrays(answers, member), member, rise, -own


def test_clid_is_the_papers_formula_and_has_its_auc():
    bank, member, rise, likelihood = clid_bank(800, np.full(4, 0.6), 0.8)
    np.testing.assert_allclose(discrepancies(bank), rise, atol=1e-12)
    parts = rise.mean(axis=1), likelihood
    widths = [np.subtract(*np.percentile(part, [75, 25])) for part in parts]
    middles = [np.median(part) for part in parts]
    expected = sum(
        w * (part - middle) / width
        for w, part, middle, width in zip((0.9, 0.1), parts, middles, widths, strict=True)
    )
    np.testing.assert_allclose(clid(bank), expected, atol=1e-9)
    weight = np.array([ALPHA, 1 - ALPHA]) / widths
    apart, spread = weight @ [0.6, 0.8], np.sqrt(weight**2 @ [1 / 4, 1])
    assert auc_of(clid(bank), member) == pytest.approx(binormal_auc(apart / spread), abs=0.03)


def test_clid_at_chance_and_without_spread():
    bank, member, *_ = clid_bank(1000, np.zeros(4), 0.0)
    assert auc_of(clid(bank), member) == pytest.approx(0.5, abs=0.04)
    assert (robust(np.ones(5)) == 0).all()


def test_clid_vec_finds_the_weights_of_the_differences():
    """The best linear score of independent normals is d apart, d² = sum d_i²."""
    shift = np.array([1.0, 0.5, 0.0, -0.3])  # not even of one sign
    bank, member, *_ = clid_bank(1000, shift, 0.4)
    best = binormal_auc(np.sqrt((shift**2).sum() + 0.4**2))
    assert auc_of(clid_vec(bank), member) == pytest.approx(best, abs=0.03)
    assert auc_of(clid(bank), member) < best - 0.04


# --- quantile ----------------------------------------------------------------------------------


def hard_and_easy(n, d, seed=0):
    """Errors whose logarithms follow the base's, with unit residuals; members' are d lower."""
    rng, member = sides(n, seed)
    base = 3 * rng.standard_normal(n)
    log_error = 0.7 * base + 2 - d * member + rng.standard_normal(n)
    answers = {("errors", ON): np.exp(log_error), ("errors", OFF): np.exp(base)}
    return bank_of_arrays({k: v[:, None].repeat(K, 1) for k, v in answers.items()}, member), member


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_quantile_takes_out_how_hard_a_picture_is(d):
    bank, member = hard_and_easy(800, d)
    assert auc_of(quantile(bank), member) == pytest.approx(binormal_auc(d), abs=0.04)
    if d:
        easier = max(auc_of(loss_mc(bank), member), auc_of(calibrated(bank), member))
        assert easier < binormal_auc(d) - 0.05


def test_quantiles_are_those_of_non_members_and_hold_back_what_they_should():
    rng, member = sides(4000, 1)
    at = rng.standard_normal((4000, 2))
    error = at @ [1.0, -0.5] + rng.standard_normal(4000)
    x = np.column_stack([error, at])
    design = np.column_stack([np.ones(4000), at])
    for level in LEVELS:
        line = quantile_line(design, error, level)
        assert np.mean(error < design @ line) == pytest.approx(level, abs=0.015)
    decide = below_quantiles(x, member)
    moved = x.copy()
    moved[member] *= 100
    np.testing.assert_array_equal(below_quantiles(moved, member)(x), decide(x))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_few_non_members_are_enough(count):
    x = np.random.default_rng(count).standard_normal((count + 1, 4))
    assert np.isfinite(below_quantiles(x, np.arange(count + 1) == 0)(x)).all()
    assert np.isfinite(below_quantiles(np.ones((4, 4)), np.arange(4) == 0)(x)).all()


# --- CDI, adaptive -----------------------------------------------------------------------------


def full_bank(n, seed=0, captions=True, **shift):
    """Every answer log-normal and unrelated to membership, but for the shifts, {probe: of the log}."""
    rng, member = sides(n, seed)
    shapes = {
        "errors": (K,), "crops": (8,), "errors_null": (4,), "errors_reduced": (3, 4),
        "gradients": (5, 2, 2), "pia": (2,), "sima": (),
    }  # fmt: skip
    answers = {}
    for probe, shape in shapes.items():
        for model in (ON, OFF):
            values = rng.standard_normal((n, *shape)) * 0.5
            by = shift.get(probe, 0.0) if model == ON else 0.0
            answers[probe, model] = np.exp(values.T + by * member).T
    return bank_of_arrays(answers, member, captions=captions), member


@pytest.mark.parametrize("features", [cdi_features, adaptive_features])
def test_features_are_few_and_finite_with_and_without_captions(features):
    widths = []
    for captions in (True, False):
        bank, _ = full_bank(20, captions=captions)
        for one in (bank, bank.as_base()):
            table = features(one)
            assert np.isfinite(table).all() and len(table) == 20
            widths.append(table.shape[1])
    assert widths == {cdi_features: [16, 16, 12, 12], adaptive_features: [22, 22, 17, 17]}[features]


@pytest.mark.parametrize("attack", [cdi, adaptive])
def test_a_single_signal_is_found_among_the_others(attack):
    """sima alone tells: the log is 1 apart at a spread of 0.5."""
    bank, member = full_bank(600, sima=-1.0)
    assert auc_of(attack(bank), member) == pytest.approx(binormal_auc(2.0), abs=0.03)


@pytest.mark.parametrize("sign", [1, -1])
def test_adaptive_finds_members_on_either_side(sign):
    bank, member = full_bank(300, errors=0.25 * sign)
    assert (auc_of(calibrated(bank), member) > 0.5) == (sign < 0)
    assert auc_of(adaptive(bank), member) > 0.75


def test_adaptive_finds_members_on_both_sides_at_once():
    """A defence that pushes half of the members too far up and leaves half too far down."""
    rng, member = sides(400, 3)
    side = np.where(rng.random(400) < 0.5, 0.5, -0.5) * member
    bank, _ = full_bank(400, seed=3)
    errors = bank.of("errors", ON) * np.exp(side)[:, None]
    answers = {
        (p, ON): bank.of(p, ON)
        for p in ("errors_null", "errors_reduced", "gradients", "pia", "sima")
    }
    answers |= {("errors", ON): errors, ("errors", OFF): bank.of("errors", OFF)}
    bank = bank_of_arrays(answers, member)
    assert auc_of(calibrated(bank), member) == pytest.approx(0.5, abs=0.1)
    assert auc_of(adaptive(bank), member) > 0.7


@pytest.mark.parametrize("attack", [clid, clid_vec, quantile, cdi, adaptive])
def test_the_smallest_bank(attack):
    """Two pictures a side and two pairs: one pair a model is left to the base control."""
    rng = np.random.default_rng(0)
    shapes = {
        "errors": (2,), "crops": (2,), "errors_null": (2,), "errors_reduced": (3, 2),
        "gradients": (0, 2, 2), "pia": (2,), "sima": (),
    }  # fmt: skip
    answers = {(p, m): rng.random((4, *s)) for p, s in shapes.items() for m in (ON, OFF)}
    bank = bank_of_arrays(answers, np.array([True, False, True, False]))
    for one in (bank, bank.as_base()):
        assert np.isfinite(attack(one)).all()


def test_bins_follow_the_timesteps_not_the_order():
    layout = Layout.of(4, np.array([900, 100, 700, 300]))
    values = np.array([[9.0, 1.0, 7.0, 3.0]])
    np.testing.assert_array_equal(binned(values, layout, 2), [[2.0, 8.0]])
    np.testing.assert_array_equal(binned(values, layout, 9), [[1.0, 3.0, 7.0, 9.0]])


def test_what_they_cost():
    layout = Layout.of(K, np.arange(K))
    own = {name: ATTACKS[name].extra.get("queries") for name in ("clid", "clid_vec")}
    assert all(count(layout) == 20 for count in own.values())
    assert [queries(ATTACKS[name], layout) for name in ("quantile", "cdi", "adaptive")] == [
        32,
        60,
        76,
    ]


# --- dataset inference -------------------------------------------------------------------------


def test_p_value_is_welchs():
    rng, member = sides(90, 0)
    scores = rng.standard_normal(90) * np.where(member, 2, 1) + 0.4 * member
    found = dataset_inference(scores, member, inflation=1.0)
    expected = ttest_ind(scores[member], scores[~member], equal_var=False, alternative="greater")
    assert found["p_value"] == pytest.approx(expected.pvalue) and found["alpha"] == 0.01
    assert dataset_inference(scores, member)["p_value"] > found["p_value"]
    assert dataset_inference(1e6 + scores, member, inflation=1.0)["p_value"] == pytest.approx(
        expected.pvalue, rel=1e-5
    )
    assert dataset_inference(-scores, member, inflation=1.0)["p_value"] == pytest.approx(
        1 - expected.pvalue
    )


def test_pictures_needed_is_what_a_search_finds():
    rng, member = sides(120, 1)
    scores = rng.standard_normal(120) + 1.0 * member
    found = dataset_inference(scores, member, inflation=1.0)["pictures_needed"]

    def median(n):
        tests = (
            ttest_ind(
                rng.choice(scores[member], n, replace=False),
                rng.choice(scores[~member], n, replace=False),
                equal_var=False, alternative="greater",
            ).pvalue
            for _ in range(RESAMPLES // 4)
        )  # fmt: skip
        return np.median(list(tests))

    assert 2 < found < 60
    assert median(found + 2) < 0.01 <= median(found - 2)


def test_a_larger_difference_needs_fewer_pictures_and_none_is_never_enough():
    rng, member = sides(400, 2)
    noise = rng.standard_normal(400)
    needed = [dataset_inference(noise + d * member, member)["pictures_needed"] for d in (0.6, 1, 2)]
    assert all(a > b for a, b in pairwise(needed)) and needed[0] <= 200
    assert dataset_inference(noise, member)["pictures_needed"] is None
    assert dataset_inference(np.zeros(400), member)["pictures_needed"] is None
    assert dataset_inference(member * 1.0, member)["p_value"] < 1e-6


def test_near_duplicates_count_once():
    rng, member = sides(60, 3)
    scores = rng.standard_normal(60) + 0.8 * member
    once = dataset_inference(scores, member)
    twice = dataset_inference(
        np.tile(scores, 2), np.tile(member, 2), groups=np.tile(np.arange(60), 2)
    )
    assert twice == once


def test_power_rises_with_the_number_of_pictures():
    def power(n):
        found = 0
        for seed in range(25):
            rng, member = sides(n, [n, seed])
            table = rng.standard_normal((n, 6))
            table[:, 0] += 0.7 * member
            scores = crossfit(table, member, logistic(), seed=seed)
            found += dataset_inference(scores, member)["p_value"] < 0.05
        return found / 25

    few, some, many = power(20), power(60), power(160)
    assert few < some < many and many > 0.8


@pytest.mark.parametrize("n", [40, 100])
def test_nothing_to_find_is_seldom_found(n):
    """Cross-fitted scores depend on one another; without `inflation` P(p < 0.05) is 0.10 to 0.15."""
    p_values, naive = [], []
    for seed in range(150):
        rng, member = sides(n, [n, seed, 7])
        table = rng.standard_normal((n, 12)) + rng.standard_normal((n, 1))
        scores = crossfit(table, member, logistic(), seed=seed)
        a, b = scores[member], scores[~member]
        naive.append(ttest_ind(a, b, equal_var=False, alternative="greater").pvalue)
        p_values.append(dataset_inference(scores, member, resamples=1)["p_value"])
    assert np.mean(np.array(p_values) < 0.05) <= 0.07
    assert np.mean(np.array(p_values) < 0.01) <= 0.03
    assert np.mean(np.array(naive) < 0.05) > 0.07


@pytest.mark.parametrize(
    "scores, member",
    [([1.0, 2, 3], [1, 0, 0]), ([1.0, np.nan, 2, 3], [1, 1, 0, 0]), ([1.0], [1, 0])],
)
def test_what_cannot_be_tested_is_said(scores, member):
    with pytest.raises(InputError):
        dataset_inference(np.array(scores), np.array(member, dtype=bool))
