"""The bank against a loop picture by picture; the attacks against Gaussian errors of known AUC."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffward.errors import InputError
from diffward.lora import LoraModule, LoraWeights
from diffward.membership.attacks.calibrated import calibrated
from diffward.membership.attacks.loss import loss, loss_mc
from diffward.membership.bank import (
    OFF,
    ON,
    Layout,
    Pairs,
    bank_of_arrays,
    build_bank,
    evaluations_made,
)
from diffward.membership.evaluate import chosen_attacks, run_attacks
from diffward.membership.probe import PROBES
from diffward.membership.statistics import auc
from diffward.models.features import encode_pictures

MEMBER = np.array([True, False] * 3)


def made(bank):
    """Answers under both models, and what they cost."""
    bank.gain()
    return evaluations_made([bank])


def lora(denoiser, seed=0, text_encoder=False, size=0.3, end="to_q"):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, shape in denoiser.module_shapes().items():
        if name.endswith(end) or (text_encoder and name.endswith("q_proj")):
            down = torch.randn(2, shape[1], generator=generator)
            up = size * torch.randn(shape[0], 2, generator=generator)
            modules[name] = LoraModule.of(name, down, up, 2.0)
    return LoraWeights(modules)


def one_by_one(denoiser, pictures, pairs, on):
    """No batches, no caches, the scheduler's own noise, the UNet and the encoders called directly."""
    table = np.zeros((len(pictures), len(pairs)))
    with torch.no_grad(), denoiser.adapter(on):
        for n, picture in enumerate(pictures):
            latents = denoiser.encode(np.stack([picture.load(16)]))
            ids = denoiser.tokenizer(
                picture.caption, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            text = denoiser.text_encoder(ids)[0]
            for k in range(len(pairs)):
                eps, t = pairs.eps[k : k + 1], pairs.t[k : k + 1]
                noisy = denoiser.sampler.add_noise(latents, eps, t)
                said = denoiser.unet(noisy, t, text).sample
                velocity = denoiser.prediction_type == "v_prediction"
                truth = denoiser.schedule.get_velocity(latents, eps, t) if velocity else eps
                table[n, k] = float(torch.nn.functional.mse_loss(said, truth))
    return table


@pytest.mark.parametrize("prediction, text_encoder", [("epsilon", False), ("v_prediction", True)])
def test_is_the_loop_picture_by_picture(tiny_denoiser, pictures, prediction, text_encoder):
    denoiser = tiny_denoiser(prediction)
    features = encode_pictures(denoiser, pictures, cache=False)
    denoiser.attach(lora(denoiser, text_encoder=text_encoder))
    assert denoiser.adapts_text == text_encoder
    pairs = Pairs.draw(denoiser, 5, seed=3)
    bank = build_bank(denoiser, features, pictures, MEMBER, pairs, batch=7)
    for model in (ON, OFF):
        np.testing.assert_allclose(
            bank.of("errors", model), one_by_one(denoiser, pictures, pairs, model == ON), rtol=1e-5
        )
    assert bank.of("errors").shape == (6, 5)
    assert evaluations_made([bank]) == 60
    assert np.abs(bank.gain()).max() > 1e-3
    for batch in (1, 64):
        other = build_bank(denoiser, features, pictures, MEMBER, pairs, batch=batch)
        np.testing.assert_allclose(other.of("errors"), bank.of("errors"), rtol=1e-5)


def test_a_lora_on_the_text_encoder_alone_shows(denoiser, pictures):
    """Off uses the base's conditioning, on the adapted one."""
    features = encode_pictures(denoiser, pictures)
    weights = lora(denoiser, text_encoder=True)
    weights.modules = {n: m for n, m in weights.modules.items() if n.startswith("text_encoder")}
    denoiser.attach(weights)
    pairs = Pairs.draw(denoiser, 4)
    bank = build_bank(denoiser, features, pictures, MEMBER, pairs)
    assert np.abs(bank.of("errors", ON) - bank.of("errors", OFF)).max() > 1e-4
    np.testing.assert_allclose(
        bank.of("errors", ON), one_by_one(denoiser, pictures, pairs, True), rtol=1e-5
    )
    np.testing.assert_allclose(
        bank.of("errors", OFF), one_by_one(denoiser, pictures, pairs, False), rtol=1e-5
    )


@pytest.mark.parametrize("probe", PROBES.names())
def test_a_probe_costs_what_it_declares(denoiser, pictures, probe):
    """The report's evaluations a picture come from these declarations: they must be what is made."""
    features = encode_pictures(denoiser, pictures, cache=False)
    weights = lora(denoiser)
    denoiser.attach(weights)
    pairs = Pairs.draw(denoiser, 8)
    bank = build_bank(denoiser, features, pictures, MEMBER, pairs, weights=weights)
    for model in (ON, OFF):
        bank.of(probe, model)
        declared = PROBES[probe].extra["evaluations"](Layout.of_pairs(pairs))
        assert bank.evaluations[probe, model] == declared * len(pictures)


def test_pairs(denoiser):
    pairs = Pairs.draw(denoiser, 10, seed=1)
    assert pairs.t.tolist() == list(range(50, 1000, 100))  # the middle of each tenth
    assert pairs.eps.shape == (10, 4, 8, 8)
    assert torch.equal(pairs.eps, Pairs.draw(denoiser, 10, seed=1).eps)
    assert not torch.equal(pairs.eps, Pairs.draw(denoiser, 10, seed=2).eps)
    assert abs(float(Pairs.draw(denoiser, 64).eps.std()) - 1) < 0.02
    with pytest.raises(InputError, match="--pairs 1"):
        Pairs.draw(denoiser, 1)


# --- the cache ---------------------------------------------------------------------------------


def build(denoiser, pictures, who, pairs=4, **options):
    features = encode_pictures(denoiser, pictures)
    member = np.arange(len(pictures)) % 2 == 0
    bank = build_bank(
        denoiser, features, pictures, member, Pairs.draw(denoiser, pairs), adapter_id=who, **options
    )
    bank.gain()
    return bank


def test_second_time_nothing_is_evaluated(tiny_denoiser, pictures):
    banks = []
    for _ in range(2):
        denoiser = tiny_denoiser()
        denoiser.attach(lora(denoiser))
        banks.append(build(denoiser, pictures, "first"))
    assert [made(bank) for bank in banks] == [48, 0]
    assert np.array_equal(banks[0].gain(), banks[1].gain())


def test_the_base_serves_every_adapter(tiny_denoiser, pictures):
    banks = []
    for seed in (1, 2):
        denoiser = tiny_denoiser()
        denoiser.attach(lora(denoiser, seed))
        banks.append(build(denoiser, pictures, f"adapter {seed}"))
    assert [made(bank) for bank in banks] == [48, 24]
    assert np.array_equal(banks[0].of("errors", OFF), banks[1].of("errors", OFF))
    assert not np.allclose(banks[0].of("errors", ON), banks[1].of("errors", ON))


def test_only_new_pictures_are_evaluated(denoiser, pictures):
    denoiser.attach(lora(denoiser))
    few = build(denoiser, pictures.at([4, 1]), "a")
    everything = build(denoiser, pictures, "a")
    assert (made(few), made(everything)) == (16, 32)
    assert np.array_equal(everything.of("errors", ON)[[4, 1]], few.of("errors", ON))


@pytest.mark.parametrize(
    "change", ["pairs", "seed", "base", "resolution", "precision", "caption", "schedule"]
)
def test_what_the_errors_depend_on_is_not_mixed_up(tiny_denoiser, pictures, change):
    denoiser = tiny_denoiser()
    denoiser.attach(lora(denoiser))
    build(denoiser, pictures, "a")
    other = {
        "base": lambda: tiny_denoiser(seed=1),
        "resolution": lambda: tiny_denoiser(resolution=24),
        "precision": lambda: tiny_denoiser(dtype=torch.bfloat16),
        "schedule": lambda: tiny_denoiser("v_prediction"),
    }.get(change, tiny_denoiser)()
    other.attach(lora(other))
    features = encode_pictures(other, pictures)
    if change == "caption":
        features = replace(features, captions=[c + "!" for c in features.captions])
    pairs = Pairs.draw(other, 5 if change == "pairs" else 4, seed=int(change == "seed"))
    bank = build_bank(other, features, pictures, MEMBER, pairs, adapter_id="a")
    assert made(bank) == 2 * 6 * len(pairs)


def test_without_an_id_nothing_is_kept(denoiser, pictures, own_cache):
    denoiser.attach(lora(denoiser))
    features = encode_pictures(denoiser, pictures, cache=False)
    build_bank(denoiser, features, pictures, MEMBER, Pairs.draw(denoiser, 4))
    assert not own_cache.exists()


def test_an_interrupted_bank_goes_on(denoiser, pictures, monkeypatch):
    many = pictures.at([0, 1, 3, 4, 5])
    denoiser.attach(lora(denoiser))
    features = encode_pictures(denoiser, many)
    # Forty pictures, so that there is more than one chunk on disk.
    rows = torch.arange(40) % 5
    features = replace(
        features,
        latents=features.latents[rows],
        captions=[features.captions[r] for r in rows],
        names=[str(i) for i in range(40)],
        _caption_index=features._caption_index[rows],
    )
    pairs = Pairs.draw(denoiser, 2)
    crowd, member = SimpleNamespace(hashes=[f"{i:064x}" for i in range(40)]), (rows < 2).numpy()
    whole = build_bank(denoiser, features, crowd, member, pairs, batch=32)
    whole.gain()
    errors = denoiser.errors

    def stopping(*args):
        if denoiser.evaluations >= before + 64:
            raise KeyboardInterrupt
        return errors(*args)

    before = denoiser.evaluations
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(denoiser, "errors", stopping)
        build_bank(denoiser, features, crowd, member, pairs, adapter_id="a", batch=32).gain()
    rest = build_bank(denoiser, features, crowd, member, pairs, adapter_id="a", batch=32)
    rest.gain()
    assert made(rest) == 160 - 64
    np.testing.assert_allclose(rest.gain(), whole.gain(), rtol=1e-6)
    with denoiser.adapter(False):  # the switch is as it was
        pass
    assert denoiser._adapter.enabled


def test_errors_that_are_not_finite(denoiser, pictures):
    denoiser.attach(lora(denoiser, size=1e30, end="to_v"))
    with pytest.raises(InputError, match="not finite"):
        build(denoiser, pictures, None)


def test_without_an_adapter_it_says_so(denoiser, pictures):
    with pytest.raises(RuntimeError, match="no adapter"):
        build(denoiser, pictures, None)


# --- attacks -----------------------------------------------------------------------------------


def synthetic(n=4000, pairs=10, d=1.0, seed=0):
    """Half members. Errors 5 + picture's own difficulty + noise; the adapter lowers members' by
    `d` standard deviations of the noise of the mean over pairs."""
    rng = np.random.default_rng(seed)
    member = np.arange(n) % 2 == 0
    difficulty = 3 * rng.standard_normal((n, 1))
    off = np.repeat(5 + difficulty, pairs, axis=1)
    noise = rng.standard_normal((n, pairs))
    on = off + noise - d * member[:, None] / math.sqrt(pairs)
    return bank_of_arrays({("errors", ON): on, ("errors", OFF): off}, member)


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("d", [-1.0, 0.0, 1.0, 2.0])
def test_attacks_on_errors_of_known_auc(d):
    bank = synthetic(d=d)
    score = calibrated(bank)
    # Binormal: the mean over pairs has standard deviation 1 / sqrt(pairs).
    expected = phi(d / math.sqrt(2))
    assert auc(score[bank.is_member], score[~bank.is_member]) == pytest.approx(expected, abs=0.025)
    shift = d * math.sqrt(0.1)
    for attack, variance in ((loss_mc, 9 + 0.1), (loss, 9 + 1.0)):
        score = attack(bank)
        expected = phi(shift / math.sqrt(2 * variance))
        found = auc(score[bank.is_member], score[~bank.is_member])
        assert found == pytest.approx(expected, abs=0.025)


def test_higher_means_member():
    on, off = [[1.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]
    bank = bank_of_arrays({("errors", ON): on, ("errors", OFF): off}, [True, False])
    assert loss(bank).tolist() == loss_mc(bank).tolist() == [-1, -3]
    assert calibrated(bank).tolist() == [1, -1]


def test_as_base():
    rng = np.random.default_rng(0)
    for pairs in (6, 7):
        on, off = rng.standard_normal((2, 4, pairs))
        given = {("errors", ON): on, ("errors", OFF): off, ("sima", ON): on, ("sima", OFF): off}
        bank = bank_of_arrays(given, MEMBER[:4], np.arange(pairs))
        base = bank.as_base()
        assert np.array_equal(base.of("errors", ON), off[:, [0, 2, 4]])
        assert np.array_equal(base.of("errors", OFF), off[:, [1, 3, 5]])
        assert base.layout.timesteps.tolist() == [0, 2, 4] and base.base


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 10, 16, 33])
def test_layout(count):
    layout = Layout.of(count, (np.arange(count) + 0.5) * 1000 / count)
    assert len(layout.middle) == min(4, count - count % 2) and len(layout.early) % 2 == 0
    assert layout.middle[-1] < count and layout.early[-1] < count
    if count >= 8:
        assert 300 < layout.timesteps[layout.middle].mean() < 600
        assert layout.timesteps[layout.early].max() <= 500
    half = layout.halved()
    # The halved bank's columns are columns 0, 2, 4 … of the whole one.
    assert np.array_equal(half.timesteps[half.middle], layout.timesteps[layout.middle[0::2]])
    assert np.array_equal(half.timesteps[half.early], layout.timesteps[layout.early[0::2]])


BASIC = "loss,loss_mc,calibrated"


def run_basic(bank):
    return run_attacks(bank, None, entries=chosen_attacks(BASIC))


def test_run_attacks():
    bank = synthetic(n=400, d=2.0)
    found = run_basic(bank)
    assert set(found.figures) == set(found.scores) == set(BASIC.split(","))
    figures = found.figures["calibrated"]
    assert figures["auc"] == pytest.approx(phi(math.sqrt(2)), abs=0.05)
    assert [f["queries_per_image"] for f in found.figures.values()] == [1, 10, 20]
    assert (found.made, found.alone) == (20, 42)
    assert figures["n_members"] == figures["n_non_members"] == 200
    assert all(f["controls"]["base_model_ok"] for f in found.figures.values())
    assert figures["controls"]["blind_auc"] is None
    assert figures["p_value"] < 1e-10 and figures["p_holm"] == pytest.approx(3 * figures["p_value"])
    assert np.array_equal(found.scores["calibrated"], calibrated(bank))


def test_what_cannot_be_run_is_told():
    bank = synthetic(n=40)
    found = run_attacks(replace(bank, captions=False), None, entries=chosen_attacks("clid,lira"))
    assert not found.figures and "captions" in found.skipped["clid"]
    assert "--shadows" in found.skipped["lira"]
    with pytest.raises(InputError, match="unknown attack 'nonsense'"):
        chosen_attacks("loss,nonsense")


def test_the_control_sees_a_base_that_knows_the_members():
    bank = synthetic(n=400, d=0.0)
    on, off = bank.of("errors", ON), bank.of("errors", OFF)
    for errors in (on, off):
        errors[bank.is_member] -= 6  # easier with and without the adapter
    found = run_basic(bank_of_arrays({("errors", ON): on, ("errors", OFF): off}, bank.is_member))
    figures = found.figures["loss_mc"]
    assert figures["auc"] > 0.8
    assert not figures["controls"]["base_model_ok"]
    assert figures["controls"]["base_model_auc"] == pytest.approx(figures["auc"], abs=0.05)
    assert found.figures["calibrated"]["auc"] == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("way", ["attached", "injected"])
def test_an_untrained_lora_gives_nothing_away(denoiser, pictures, way):
    if way == "attached":
        denoiser.attach(lora(denoiser, size=0.0))
    else:
        denoiser.inject(2, 2.0, ["to_q", "conv1"], text_encoder=True)
    bank = build(denoiser, pictures, None)
    assert not calibrated(bank).any()
    figures = run_basic(bank).figures["calibrated"]
    assert figures["auc"] == 0.5
    assert figures["auc_signfree"] == 0.5
