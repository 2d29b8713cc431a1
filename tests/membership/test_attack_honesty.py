"""What must hold of every attack, whichever are registered: no label leaks, nothing is asked in secret,
higher is member, chance is chance, and the base control sees nothing of the adapter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffward.lora import LoraModule, LoraWeights
from diffward.membership import attacks as _attacks  # noqa: F401  (registers them)
from diffward.membership.attack import ATTACKS
from diffward.membership.bank import OFF, ON, Bank, Pairs, bank_of_arrays, build_bank
from diffward.membership.probe import PROBES
from diffward.membership.shadow import Shadows
from diffward.membership.statistics import auc
from diffward.models.features import encode_pictures

N, FEW, K = 60, 24, 16  # few: for attacks that train a network a fold
ENTRIES = {entry.name: entry for entry in ATTACKS}
NETS = ("mlp", "secmi_nn")
QUICK = [name for name in ENTRIES if name not in NETS]
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name in NETS else []) for name in ENTRIES]

# With the adapter on, which way does the theory say that a member's answers differ?
DIRECTION = {
    "errors": -1,
    "errors_null": 0,  # the model overfits to the picture under its caption
    "errors_reduced": 0,
    "crops": 0,  # … and to the picture as it is
    "maps": -1,
    "secmi": -1,
    "pia": -1,
    "sima": -1,
    "gradients": -1,
    "alignment": +1,
    "generated": +1,
}


@pytest.fixture(scope="module")
def shapes(tiny_denoiser, tmp_path_factory):
    """{probe: answer (…) of one picture}, asked of a real model: its shape, size and sign."""
    from PIL import Image

    from diffward.data import load_pictures

    folder = tmp_path_factory.mktemp("two")
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} cup")
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures := load_pictures(folder), cache=False)
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, shape in denoiser.module_shapes().items():
        if name.endswith(("to_q", "to_v")):
            down, up = (torch.randn(s, generator=generator) for s in ((2, shape[1]), (shape[0], 2)))
            modules[name] = LoraModule.of(name, down, up, 2.0)
    denoiser.attach(weights := LoraWeights(modules))
    bank = build_bank(
        denoiser,
        features,
        pictures,
        np.array([True, False]),
        Pairs.draw(denoiser, K),
        weights=weights,
    )
    return {entry.name: bank.of(entry.name, ON)[0] for entry in PROBES}


def answers_of(shapes, n, seed, member=None, by=0.0):
    """Random answers, unrelated to membership but for `by` spreads in the direction of the theory."""
    rng = np.random.default_rng(seed)
    answers = {}
    for probe, one in shapes.items():
        for model in (ON, OFF):
            noise = rng.standard_normal((n, *one.shape))
            if member is not None and model == ON:
                noise = (noise.T + by * DIRECTION[probe] * member).T
            positive = (one > 0).all()
            answers[probe, model] = one * np.exp(0.3 * noise) if positive else 0.3 * noise
    return answers


def labels(n, seed):
    return np.random.default_rng([seed, 1]).permutation(n) < n // 2


def shadows_of(n, seed, gain=None):
    """Shadow LoRAs for which training a picture in makes no difference, or that of `gain`."""
    rng = np.random.default_rng([seed, 2])
    half = [rng.permutation(n) < n // 2 for _ in range(4)]
    inside = np.stack([side for h in half for side in (h, ~h)])
    return Shadows((gain or 0.0) * inside + rng.standard_normal(inside.shape), inside)


def bank_for(name, shapes, n=None, seed=0, member=None, by=0.0, **more):
    """A bank with what this attack needs."""
    n = n or (N if name in QUICK else FEW)
    asked = {probe for probe, _ in ENTRIES[name].extra["asks"]}
    chosen = {probe: shapes[probe] for probe in shapes if probe in asked}
    truth = labels(n, seed) if member is None else member
    answers = answers_of(chosen, n, seed, truth, by)
    if "shadows" in ENTRIES[name].extra.get("needs", ()):
        more["shadows"] = shadows_of(n, seed, by)
    return bank_of_arrays(answers, truth, **more)


def flipped(bank: Bank, row: int) -> Bank:
    other = bank.is_member.copy()
    other[row] = not other[row]
    return replace(bank, is_member=other)


def recording(bank: Bank, asked: set[tuple[str, str]]) -> Bank:
    def ask(probe: str, model: str) -> np.ndarray:
        asked.add((probe, model))
        return bank.ask(probe, model)

    return replace(bank, ask=ask)


def test_every_probe_has_a_direction():
    assert {entry.name for entry in PROBES} == set(DIRECTION), "say which way members differ"


@pytest.mark.parametrize("name", ALL)
def test_scores_are_finite_repeatable_and_one_a_picture(name, shapes):
    bank = bank_for(name, shapes)
    before = {key: bank.of(*key).copy() for key in ENTRIES[name].extra["asks"]}
    scores = ENTRIES[name].obj(bank)
    assert scores.shape == (len(bank),) and scores.dtype == np.float64 and np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, ENTRIES[name].obj(bank))
    for key, answer in before.items():
        np.testing.assert_array_equal(bank.of(*key), answer)  # left as they were


@pytest.mark.parametrize("name", ALL)
def test_a_pictures_own_label_has_no_way_into_its_score(name, shapes):
    bank = bank_for(name, shapes, by=1.0)
    scores = ENTRIES[name].obj(bank)
    for row in (0, 17, len(bank) - 1) if name in QUICK else (17,):
        again = ENTRIES[name].obj(flipped(bank, row))
        np.testing.assert_allclose(again[row], scores[row], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", QUICK)
def test_nor_have_its_near_duplicates_labels(name, shapes):
    bank = replace(bank_for(name, shapes, by=1.0), groups=np.arange(N) // 2)
    scores, again = ENTRIES[name].obj(bank), ENTRIES[name].obj(flipped(bank, 16))
    np.testing.assert_allclose(again[17], scores[17], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_labels_matter_only_to_attacks_that_say_so(name, shapes):
    bank = bank_for(name, shapes, by=1.0)
    scores = ENTRIES[name].obj(bank)
    other = ENTRIES[name].obj(replace(bank, is_member=labels(len(bank), 99)))
    assert np.array_equal(scores, other) != ("labels" in ENTRIES[name].extra.get("needs", ()))


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_an_attack_asks_for_what_it_says(name, shapes, captions):
    needs = ENTRIES[name].extra.get("needs", ())
    if not captions and "captions" in needs:
        pytest.skip("is not run without captions")
    asked: set[tuple[str, str]] = set()
    ENTRIES[name].obj(recording(bank_for(name, shapes, captions=captions), asked))
    said = set(ENTRIES[name].extra["asks"])
    assert asked <= said and all(probe in PROBES for probe, _ in said)
    # Without captions, what caption attacks ask may be left out, and nothing else.
    assert {probe for probe, _ in said - asked} <= (
        set() if captions else {"errors_null", "errors_reduced"}
    )


@pytest.mark.parametrize("name", ALL)
def test_higher_is_member(name, shapes):
    """Answers as theory has them: a spread or more apart, so the AUC is far above a half."""
    bank = bank_for(name, shapes, n=100 if name in QUICK else 40, by=1.5)
    scores = ENTRIES[name].obj(bank)
    assert auc(scores[bank.is_member], scores[~bank.is_member]) > 0.65


@pytest.mark.parametrize("name", QUICK)
def test_chance_is_chance(name, shapes):
    """Members are drawn anew each time; the AUC of cross-fitted scores has a spread of 0.09 here."""
    bank = bank_for(name, shapes, n=N)
    found = []
    for seed in range(60):
        member = labels(N, seed)
        more = {"shadows": shadows_of(N, seed)} if bank.shadows is not None else {}
        scores = ENTRIES[name].obj(replace(bank, is_member=member, seed=seed, **more))
        found.append(auc(scores[member], scores[~member]))
    assert np.mean(found) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", ALL)
def test_the_base_control_sees_nothing_of_the_adapter(name, shapes):
    """Also of attacks that ask for both models: each half of the pairs is the base's."""
    bank = bank_for(name, shapes, by=3.0)
    asked: set[tuple[str, str]] = set()
    control = ENTRIES[name].obj(recording(bank, asked).as_base())
    assert np.isfinite(control).all() and control.shape == (len(bank),)
    assert asked and all(model == OFF for _, model in asked)
