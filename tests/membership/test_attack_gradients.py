"""GSA against autograd through PEFT, sample by sample, and on features of known AUC."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffward.lora import LoraModule, LoraWeights
from diffward.membership import attacks as _attacks  # noqa: F401  (registers them)
from diffward.membership.attack import ATTACKS, queries
from diffward.membership.bank import OFF, ON, Layout, Pairs, bank_of_arrays, build_bank
from diffward.membership.factors import own_factors, random_factors
from diffward.membership.probes.gradients import gradient_pairs
from diffward.membership.statistics import auc
from diffward.models.adapters import TARGETS
from diffward.models.features import encode_pictures

from .toy import binormal_auc


def through_peft(denoiser, latents, text, pairs, weights):
    """Squared norms {module: (n, 2, 2)}, one picture and one timestep at a time, by autograd."""
    down = next(iter(weights.modules.values())).tensors["down"]
    rank, alpha = len(down), next(iter(weights.modules.values())).alpha
    adapter = denoiser.inject(rank, alpha, TARGETS["all"], text_encoder=False)
    adapter.load(weights)
    chosen = gradient_pairs(Layout.of_pairs(pairs))
    found = {name: np.zeros((len(latents), 2, 2)) for name in adapter.layers()}
    for n in range(len(latents)):
        total = [torch.zeros_like(p) for p in adapter.parameters()]
        squares = np.zeros(len(total))
        for k in chosen:
            t, eps = pairs.t[k : k + 1], pairs.eps[k : k + 1]
            noisy = denoiser.schedule.add_noise(latents[n : n + 1], eps, t)
            velocity = denoiser.prediction_type == "v_prediction"
            truth = denoiser.schedule.get_velocity(latents[n : n + 1], eps, t) if velocity else eps
            said = denoiser.unet(noisy, t, text[n : n + 1]).sample
            loss = torch.nn.functional.mse_loss(said, truth)
            slopes = torch.autograd.grad(loss, adapter.parameters())
            total = [a + b for a, b in zip(total, slopes)]
            squares += [float((s**2).sum()) for s in slopes]
        mean = [float(((s / len(chosen)) ** 2).sum()) for s in total]
        for i, name in enumerate(adapter.layers()):
            for factor in (0, 1):
                found[name][n, factor] = mean[2 * i + factor], squares[2 * i + factor] / len(chosen)
    denoiser.detach()
    return found


def all_targets(denoiser, rank=3, alpha=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapter = denoiser.inject(rank, alpha, TARGETS["all"], text_encoder=False)
    weights = adapter.weights()
    denoiser.detach()
    for module in weights.modules.values():
        module.tensors["up"].normal_(0, 0.1, generator=generator)
    return weights


def bank_with(denoiser, features, pictures, pairs, weights, **more):
    denoiser.attach(weights)
    member = np.arange(len(pictures)) % 2 == 0
    return build_bank(denoiser, features, pictures, member, pairs, weights=weights, **more)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_norms_are_those_of_autograd_through_peft(tiny_denoiser, pictures, prediction):
    """Linear layers, and convolutions of every kernel and stride."""
    denoiser = tiny_denoiser(prediction)
    features = encode_pictures(denoiser, pictures, cache=False)
    weights = all_targets(denoiser)
    assert any(m.tensors["down"].shape[-1] == 3 for m in weights.modules.values())
    pairs = Pairs.draw(denoiser, 3, seed=1)
    few = torch.arange(2)
    truth = through_peft(denoiser, features.latents[:2], features.conditioning(few), pairs, weights)
    bank = bank_with(denoiser, features, pictures, pairs, weights, batch=24)
    ours = bank.of("gradients", ON)
    assert ours.shape == (len(pictures), len(weights.modules), 2, 2)
    # The bank's modules are in the UNet's order, PEFT's in that of its attributes.
    theirs = np.stack(list(truth.values()), axis=1)
    order, other = np.argsort(ours[0, :, 0, 0]), np.argsort(theirs[0, :, 0, 0])
    np.testing.assert_allclose(ours[:2, order], theirs[:, other], rtol=1e-4)
    assert np.all(ours > 0)
    assert bank.evaluations["gradients", ON] == 9 * len(pictures)
    for batch in (1, 64):
        again = bank_with(denoiser, features, pictures, pairs, weights, batch=batch)
        np.testing.assert_allclose(again.of("gradients", ON), ours, rtol=1e-4)


def test_modules_come_in_the_order_of_the_forward_pass(tiny_denoiser, pictures):
    """One module at a time, against all at once."""
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures, cache=False)
    pairs = Pairs.draw(denoiser, 2)
    weights = all_targets(denoiser)
    names = [
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v",
    ]
    shuffled = [names[i] for i in (2, 0, 1)]
    small = replace(weights, modules={n: weights.modules[n] for n in shuffled})
    together = bank_with(denoiser, features, pictures, pairs, small).of("gradients", OFF)
    denoiser.attach(small)
    for place, name in enumerate(names):
        fresh = random_factors(own_factors(small.resolve(denoiser.module_shapes())), 0)
        layer = denoiser.unet.get_submodule(name.removeprefix("unet."))
        layer.weight.requires_grad_(True)
        with torch.enable_grad(), denoiser.adapter(False):
            t, eps = pairs.t[:2], pairs.eps[:2]
            text = features.conditioning(torch.tensor([1, 1]))
            error = denoiser.errors(features.latents[[1, 1]], t, eps, text).mean()
            (slope,) = torch.autograd.grad(error, layer.weight)
        layer.weight.requires_grad_(False)
        module = fresh.modules[name]
        up, down = (module.tensors[r].flatten(1) for r in ("up", "down"))
        slope = slope.flatten(1) * module.scale
        expected = [float(((up.T @ slope) ** 2).sum()), float(((slope @ down.T) ** 2).sum())]
        np.testing.assert_allclose(together[1, place, :, 0], expected, rtol=1e-4)


def test_the_base_is_probed_along_factors_that_tell_nothing_of_the_trained_ones(
    tiny_denoiser, pictures
):
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures, cache=False)
    pairs = Pairs.draw(denoiser, 2)
    found = []
    for seed in (0, 1):
        weights = all_targets(denoiser, seed=seed)
        bank = bank_with(denoiser, features, pictures, pairs, weights)
        found.append((bank.of("gradients", ON), bank.of("gradients", OFF)))
        np.testing.assert_array_equal(bank.as_base().of("gradients", ON), found[-1][1])
    assert np.abs(found[0][0] / found[1][0] - 1).max() > 0.1
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_a_lora_on_the_text_encoder_alone_has_no_gradients(tiny_denoiser, pictures):
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures, cache=False)
    adapter = denoiser.inject(2, 2.0, TARGETS["attention"], text_encoder=True)
    weights = adapter.weights()
    denoiser.detach()
    modules = {n: m for n, m in weights.modules.items() if n.startswith("text_encoder")}
    bank = bank_with(denoiser, features, pictures, Pairs.draw(denoiser, 2), LoraWeights(modules))
    np.testing.assert_array_equal(ATTACKS["gsa1"].obj(bank), 0)


def test_own_factors_multiply_to_the_change():
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    plain = LoraModule.of("unet.a", draw(2, 6), draw(5, 2), 1.0)
    locon = LoraModule.of("unet.b", draw(2, 6, 3, 3), draw(5, 2, 1, 1), 1.0)
    tensors = {"down": draw(2, 6, 1, 1), "up": draw(5, 2, 1, 1), "mid": draw(2, 2, 3, 3)}
    middle = LoraModule("unet.c", "locon", tensors, 1.0, 2, (5, 6, 3, 3))
    tensors = {
        f"hada_w{i}_{s}": draw(*((5, 1) if s == "a" else (1, 54))) for i in (1, 2) for s in "ab"
    }
    loha = LoraModule("unet.d", "loha", tensors, 3.0, 1, (5, 6, 3, 3))
    tensors = {"lokr_w1": draw(2, 2), "lokr_w2": draw(4, 3)}
    lokr = LoraModule("unet.e", "lokr", tensors, None, 6, (8, 6), scale_override=0.5)
    text = LoraModule.of("text_encoder.f", draw(2, 6), draw(5, 2), 1.0)
    given = {m.name: m for m in (plain, locon, middle, loha, lokr, text)}
    own = own_factors(LoraWeights(given)).modules
    assert list(own) == list(given)[:-1]
    assert own["unet.a"] is plain and own["unet.b"] is locon
    for name, module in own.items():
        assert set(module.tensors) == {"down", "up"}
        torch.testing.assert_close(module.delta(), given[name].delta(), atol=1e-5, rtol=1e-4)
    # DoRA: the low-rank part, whatever the magnitude.
    tensors = {**plain.tensors, "magnitude": draw(5)}
    dora = replace(plain, kind="dora", tensors=tensors)
    (bare,) = own_factors(LoraWeights({"unet.a": dora})).modules.values()
    torch.testing.assert_close(bare.delta(), plain.delta())
    # Of a higher rank than the file's: the best there is, balanced, and nothing that is not finite.
    tensors = {
        f"hada_w{i}_{s}": draw(*((7, 2) if s == "a" else (2, 6))) for i in (1, 2) for s in "ab"
    }
    wide = LoraModule("unet.g", "loha", tensors, 2.0, 2, (7, 6))
    (best,) = own_factors(LoraWeights({"unet.g": wide})).modules.values()
    u, s, v = torch.linalg.svd(wide.delta())
    torch.testing.assert_close(best.delta(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5, rtol=1e-4)
    down, up = best.tensors["down"], best.tensors["up"]
    torch.testing.assert_close(up.T @ up, down @ down.T, atol=1e-4, rtol=1e-3)
    zero = replace(wide, tensors={r: 0 * t for r, t in tensors.items()})
    (nothing,) = own_factors(LoraWeights({"unet.g": zero})).modules.values()
    assert nothing.tensors["down"].abs().max() == nothing.tensors["up"].abs().max() == 0


def test_fresh_factors_keep_names_shapes_and_scales_alone():
    g = torch.Generator().manual_seed(0)
    modules = [
        LoraModule.of(
            f"unet.{i}", torch.randn(4, 30, generator=g), torch.randn(9, 4, generator=g), 8.0
        )
        for i in range(3)
    ]
    own = LoraWeights({m.name: m for m in modules})
    other = LoraWeights(
        {
            n: replace(m, tensors={r: 5 * t for r, t in m.tensors.items()})
            for n, m in own.modules.items()
        }
    )
    first, same, next_seed = (
        random_factors(own, 3),
        random_factors(other, 3),
        random_factors(own, 4),
    )
    for name, module in first.modules.items():
        assert module.scale == 2.0
        for role, tensor in module.tensors.items():
            assert tensor.shape == own.modules[name].tensors[role].shape
            assert torch.equal(tensor, same.modules[name].tensors[role])
            assert not torch.equal(tensor, next_seed.modules[name].tensors[role])
        assert module.tensors["down"].abs().max() <= 30**-0.5


def gradient_bank(n, d, kind, modules=17, seed=0):
    """Norms whose logarithm is one normal number a picture, lower by d for members, plus offsets."""
    rng = np.random.default_rng(seed)
    member = rng.permutation(n) < n // 2
    hardness = rng.standard_normal(n) - d * member
    norms = np.exp(rng.standard_normal((n, modules, 2, 2)))  # kinds that carry nothing
    shared = np.exp(rng.standard_normal((1, modules, 2)) + hardness[:, None, None])
    norms[..., kind] = shared
    return bank_of_arrays({("gradients", ON): norms, ("gradients", OFF): norms[::-1]}, member)


@pytest.mark.parametrize("d", [0.0, 1.0])
@pytest.mark.parametrize("name, kind", [("gsa1", 0), ("gsa2", 1)])
def test_auc_is_the_known_one(name, kind, d):
    bank = gradient_bank(800, d, kind)
    entry = ATTACKS[name]
    scores = entry.obj(bank)
    # Standard error of an AUC of 400 and 400 at chance: 0.02; cross-fitting widens it.
    assert auc(scores[bank.is_member], scores[~bank.is_member]) == pytest.approx(
        binormal_auc(d), abs=0.07 if d == 0 else 0.04
    )
    assert entry.extra["needs"] == ("labels",) and entry.extra["suite"] == "standard"
    assert queries(entry, bank.layout) == 24


@pytest.mark.parametrize("name, kind", [("gsa1", 1), ("gsa2", 0)])
def test_each_attack_looks_at_its_own_kind(name, kind):
    bank = gradient_bank(800, 2.0, kind)
    scores = ATTACKS[name].obj(bank)
    assert auc(scores[bank.is_member], scores[~bank.is_member]) == pytest.approx(0.5, abs=0.1)


def test_few_modules_and_factors_of_zero_are_no_trouble():
    bank = gradient_bank(60, 2.0, 0, modules=2)
    norms = bank.of("gradients", ON)
    norms[:, 0] = 0
    scores = ATTACKS["gsa1"].obj(bank_of_arrays({("gradients", ON): norms}, bank.is_member))
    assert np.isfinite(scores).all() and auc(scores[bank.is_member], scores[~bank.is_member]) > 0.8


def test_pairs_are_spaced_evenly():
    def layout(count):
        return Layout.of(count, np.arange(count))

    assert gradient_pairs(layout(16)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert gradient_pairs(layout(3)) == [0, 1, 2]
    assert len(set(gradient_pairs(layout(11)))) == 8
