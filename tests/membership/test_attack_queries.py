"""PIA, PIAN, SimA, SecMI and the perceptron: against errors of known AUC, and against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffward.lora import LoraModule, LoraWeights
from diffward.membership.attack import ATTACKS
from diffward.membership.attacks import mlp, secmi_nn
from diffward.membership.bank import OFF, ON, Pairs, build_bank
from diffward.membership.probe import PROBES
from diffward.membership.schedule import ddim_step, eps_of, moment, x0_of
from diffward.membership.statistics import auc
from diffward.models.features import encode_pictures
from tests.membership.toy import binormal_auc, shifted, toy_bank

N = 600
SPREAD = 0.3  # of the log of the errors' size: what the toy's random noise adds is small against it
DIRECT = ["pia", "pian", "sima", "secmi"]
PROBED = {"pia": 3, "sima": 1, "secmi": 16, "maps": 8}


def area(scores, member):
    return auc(scores[member], scores[~member])


@pytest.fixture(scope="module", params=[0.0, 1.0, 2.0])
def known(request):
    on, off, member = shifted(N, request.param, seed=1, spread=SPREAD)
    return toy_bank(on, off, member)[0], request.param


@pytest.mark.parametrize("name", DIRECT)
def test_auc_is_the_known_one(known, name):
    bank, d = known
    expected, half = binormal_auc(d), N // 2
    # Hanley & McNeil 1982
    q1, q2 = expected / (2 - expected), 2 * expected**2 / (1 + expected)
    spread = math.sqrt(
        (expected * (1 - expected) + (half - 1) * (q1 + q2 - 2 * expected**2)) / half**2
    )
    scores = ATTACKS[name].obj(bank)
    assert scores.shape == (N,) and scores.dtype == np.float64
    assert abs(area(scores, bank.is_member) - expected) < 3 * spread + 0.01


@pytest.mark.parametrize("name", DIRECT)
def test_the_control_is_the_base_alone(name):
    """At chance whatever the adapter does, and without a question to it."""
    on, off, member = shifted(N, 3.0, seed=2, spread=SPREAD)
    bank, _ = toy_bank(on, off, member)
    scores = ATTACKS[name].obj(bank.as_base())
    assert abs(area(scores, member) - 0.5) < 0.08
    assert {model for _, model in bank.evaluations} == {OFF}


def test_queries():
    layout = toy_bank(*shifted(4, 0))[0].layout
    assert {name: PROBES[name].extra["evaluations"](layout) for name in PROBED} == PROBED
    for name, count in {"pia": 2, "pian": 2}.items():
        assert ATTACKS[name].extra["queries"](layout) == count  # the probe asks for both


# --- the attacks that learn --------------------------------------------------------------------


def learned(name, d, n):
    on, off, member = shifted(n, d, seed=3, spread=SPREAD)
    bank, _ = toy_bank(on, off, member)
    return area(ATTACKS[name].obj(bank), member)


@pytest.mark.parametrize("name, n", [("secmi_nn", 80), ("mlp", 40)])
def test_what_is_learned_separates(name, n):
    state = torch.get_rng_state()
    assert learned(name, 4.0, n) > 0.9
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["secmi_nn", "mlp"])
def test_what_is_learned_from_nothing_is_chance(name, monkeypatch):
    monkeypatch.setattr({"secmi_nn": secmi_nn, "mlp": mlp}[name], "EPOCHS", 2)
    once = learned(name, 0.0, 100)
    assert abs(once - 0.5) < 0.2  # cross-fitted scores spread 1.5 times as wide as independent ones
    assert learned(name, 0.0, 100) == once


def test_the_perceptron_is_that_of_the_paper():
    with torch.device("meta"):
        net = mlp.network(4 * 64 * 64)
    assert sum(p.numel() for p in net.parameters()) == 8_520_962
    assert [layer.p for layer in net if isinstance(layer, torch.nn.Dropout)] == [0.5, 0.5]
    assert (mlp.EPOCHS, mlp.RATE, mlp.DECAY) == (100, 1e-5, 1e-4)


def test_the_perceptron_looks_at_no_other_rows(monkeypatch):
    monkeypatch.setattr(mlp, "EPOCHS", 9)
    maps = torch.rand(12, 8, 16)
    maps[8:] = torch.nan
    rows, member = np.arange(8.0)[:, None], np.arange(8) % 2 == 0
    decide = mlp.perceptron(maps)(rows, member)
    scores = decide(rows)
    assert np.isfinite(scores).all() and ((scores > 0) & (scores < 1)).all()
    assert np.isnan(decide(np.array([[9.0]])))


@pytest.mark.parametrize("left", [0, 1, 2, 15])
def test_the_network_takes_any_number_of_maps(left, monkeypatch):
    """Batch normalisation fails on a batch of one map of one cell."""
    monkeypatch.setattr(secmi_nn, "EPOCHS", 1)
    x = np.random.default_rng(0).random((2 * secmi_nn.BATCH + left, 3 * 4))
    decide = secmi_nn.resnet((3, 2, 2))(x, np.arange(len(x)) % 2 == 0)
    assert np.isfinite(decide(x[:1])).all()


# --- the probes, against a loop picture by picture -----------------------------------------------


class Plain:
    """One picture, with diffusers' own scheduler."""

    def __init__(self, denoiser, text):
        self.denoiser, self.text = denoiser, text
        self.scheduler = DDIMScheduler.from_config(
            denoiser.sampler.config, clip_sample=False, prediction_type=denoiser.prediction_type
        )
        self.scheduler.set_timesteps(100)
        self.abar = self.scheduler.alphas_cumprod

    def eps(self, z, t):
        said = self.denoiser.unet(z, t, self.text).sample
        clean = self.scheduler.step(said, t, z).pred_original_sample
        return (z - self.abar[t] ** 0.5 * clean) / (1 - self.abar[t]) ** 0.5

    def step(self, z, t, end):
        """In y = z / sqrt(abar) DDIM is Euler's method for dy = eps dp, p = sqrt(1 / abar - 1)."""
        p = (1 / self.abar - 1) ** 0.5
        y = z / self.abar[t] ** 0.5 + (p[end] - p[t]) * self.eps(z, t)
        return y * self.abar[end] ** 0.5

    def pia(self, z):
        e0 = self.eps(z, 0)
        distances = []
        for e in (e0, e0 / e0.abs().mean() * math.sqrt(2 / math.pi)):
            noisy = self.scheduler.add_noise(z, e, torch.tensor([500]))
            distances.append(((self.eps(noisy, 500) - e) ** 4).sum() ** 0.25)
        return torch.stack(distances)

    def sima(self, z):
        return (self.eps(z, 100) ** 4).sum() ** 0.25

    def secmi(self, z):
        for t in range(0, 140, 10):
            z = self.step(z, t, t + 10)
        return (self.step(self.step(z, 140, 150), 150, 140) - z).abs()[0]

    def maps(self, z, row, seed):
        rng = np.random.default_rng([seed, row])
        times = rng.integers(1000, size=8)
        found = []
        for t, eps in zip(times, torch.tensor(rng.standard_normal((8, 4, 8, 8), np.float32))):
            t = torch.tensor([t])
            said = self.denoiser.unet(self.scheduler.add_noise(z, eps, t), t, self.text).sample
            velocity = self.denoiser.prediction_type == "v_prediction"
            truth = self.scheduler.get_velocity(z, eps, t) if velocity else eps
            found.append((said - truth)[0] ** 2)
        return torch.stack(found)


def lora(denoiser):
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, (out, size, *_) in denoiser.module_shapes().items():
        if name.startswith("unet") and name.endswith("to_q"):
            down, up = (torch.randn(s, generator=generator) for s in ((2, size), (out, 2)))
            modules[name] = LoraModule.of(name, down, 0.3 * up, 2.0)
    return LoraWeights(modules)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_is_the_loop_picture_by_picture(tiny_denoiser, pictures, prediction):
    denoiser = tiny_denoiser(prediction)
    features = encode_pictures(denoiser, pictures, cache=False)
    denoiser.attach(lora(denoiser))
    pairs, member = Pairs.draw(denoiser, 4, seed=3), np.arange(len(pictures)) % 2 == 0
    banks = [
        build_bank(denoiser, features, pictures, member, pairs, batch=batch) for batch in (7, 64)
    ]
    for model, which, asked in ((ON, (0, 2, 5), banks), (OFF, (3,), banks[:1])):
        with torch.no_grad(), denoiser.adapter(model == ON):
            for row in which:
                rows = torch.tensor([row])
                plain = Plain(denoiser, features.conditioning(rows))
                for name in PROBED:
                    extra = (row, 3) if name == "maps" else ()
                    expected = getattr(plain, name)(features.latents[rows], *extra).numpy()
                    for bank in asked:
                        np.testing.assert_allclose(
                            bank.of(name, model)[row], expected, rtol=2e-4, atol=1e-5, err_msg=name
                        )
    for (name, _), count in banks[0].evaluations.items():
        assert count == PROBED[name] * len(pictures)
    for name in PROBED:
        assert np.abs(banks[0].of(name, ON) - banks[0].of(name, OFF)).max() > 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_schedule(tiny_denoiser, prediction):
    """A prediction that is right gives the noise and the clean latent back, and DDIM keeps both."""
    denoiser = tiny_denoiser(prediction)
    z, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, target = torch.tensor([0, 500, 900]), torch.tensor([10, 140, 999])
    noisy, right = denoiser.noise(z, t, eps), denoiser.target(z, t, eps)
    torch.testing.assert_close(eps_of(denoiser, right, noisy, t), eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x0_of(denoiser, right, noisy, t), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ddim_step(denoiser, right, noisy, t, target), denoiser.noise(z, target, eps),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    assert moment(denoiser, 140, z).tolist() == [140] * 3
