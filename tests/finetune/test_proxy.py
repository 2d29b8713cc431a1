"""The truth is planted: toy error maps in which members differ from others in a known way, or not at all."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from diffward.finetune.proxy import PaperAttacker, ProxyAttacker, drawing
from diffward.metrics.roc import auc


def toy(n, gain, random, shape=(4, 8, 8)):
    """Members' and others' (errors, base, t): members' errors are `gain(t)` times what they would be."""
    sides = []
    for member in (True, False):
        t = torch.randint(1000, (n,), generator=random)
        level = 0.05 + 0.1 * torch.rand(n, 1, 1, 1, generator=random)
        base = level * torch.randn(n, *shape, generator=random) ** 2
        # What a LoRA changes anyhow, on all pictures alike.
        errors = base * (0.95 + 0.1 * torch.rand(base.shape, generator=random))
        if member:
            errors = errors * gain(t)[:, None, None, None]
        sides.append((errors, base, t))
    return sides


def steady(gain):
    return lambda t: torch.full(t.shape, gain)


@functools.cache
def taught_steady(gain):
    return taught(steady(gain))


def taught(gain, updates=100, seed=0):
    """An attacker taught on fresh draws, and its AUC on others yet."""
    attacker, random = ProxyAttacker(seed), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(attacker.parameters(), lr=3e-3)
    for step in range(updates):
        features = torch.cat([attacker.features(*side) for side in toy(16, gain, random)])
        attacker.observe(features)
        labels = torch.arange(2).repeat_interleave(16).flip(0).float()
        with drawing(seed, step, 2):
            loss = binary_cross_entropy_with_logits(attacker.judge(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    attacker.eval()
    with torch.no_grad():
        members, others = (attacker(*side) for side in toy(300, gain, random))
    return attacker, auc(members, others), members


def test_learns_a_planted_difference():
    _, value, members = taught_steady(0.9)
    assert value > 0.95 and float((members > 0).float().mean()) > 0.8


def test_stays_at_chance_where_there_is_none():
    _, value, _ = taught_steady(1.0)
    assert abs(value - 0.5) < 0.08  # three standard errors of 300 against 300


def test_knows_the_timestep():
    """Members are better below t = 500 and worse above: without t, nothing to be seen."""
    _, value, _ = taught(lambda t: torch.where(t < 500, 0.85, 1 / 0.85), updates=250)
    assert value > 0.85


def test_takes_maps_of_any_size():
    attacker, random = taught_steady(0.9)[0], torch.Generator()
    for shape in [(1, 1, 1), (3, 5, 7), (4, 64, 64), (4, 96, 64), (12, 8, 8), (16, 16, 16)]:
        for errors, base, t in toy(3, steady(0.9), random, shape):
            errors.requires_grad_(True)
            logits = attacker(errors, base, t)
            (slope,) = torch.autograd.grad(logits.sum(), errors)
            assert logits.shape == (3,) and torch.isfinite(slope).all() and slope.any()
    flat = torch.full((2, 4, 8, 8), 0.1, requires_grad=True)
    (slope,) = torch.autograd.grad(attacker(flat, flat.detach(), torch.tensor([1, 2])).sum(), flat)
    assert torch.isfinite(slope).all()
    other_size = toy(300, steady(0.9), random, (4, 16, 16))
    with torch.no_grad():
        assert auc(*(attacker(*side) for side in other_size)) > 0.9


def test_single_precision_whatever_surrounds_it():
    attacker = taught_steady(0.9)[0]
    errors, base, t = toy(4, steady(1.0), torch.Generator())[0]
    outside = attacker(errors, base, t)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attacker(errors, base, t)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    assert attacker(errors.bfloat16(), base.bfloat16(), t).dtype == torch.float32


@pytest.mark.parametrize("make", [ProxyAttacker, lambda seed: PaperAttacker(256, seed)])
def test_starts_from_the_seed_alone(make):
    def numbers(seed):
        return torch.cat([v.flatten().float() for v in make(seed).state_dict().values()])

    first = numbers(3)
    torch.rand(5)
    state = torch.get_rng_state()
    assert torch.equal(numbers(3), first) and not torch.equal(numbers(4), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_untaught_it_is_at_chance_and_presses_nothing():
    errors, base, t = toy(4, steady(1.0), torch.Generator())[0]
    errors.requires_grad_(True)
    logits = ProxyAttacker(0).eval()(errors, base, t)
    assert not logits.any()
    assert not torch.autograd.grad(logits.sum(), errors)[0].any()


def test_running_figures_are_those_of_all_it_saw():
    attacker, random = ProxyAttacker(0), torch.Generator().manual_seed(4)
    features = 3 + 2 * torch.randn(90, attacker.width, generator=random)
    for some in features.split([1, 30, 59]):
        attacker.observe(some)
    seen = features[:, : attacker.scaled]
    torch.testing.assert_close(attacker.mean, seen.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(attacker.var, seen.var(0, correction=0), atol=1e-3, rtol=1e-3)


def test_the_papers_network_is_the_papers():
    attacker = PaperAttacker(4 * 64 * 64, 0)
    assert sum(p.numel() for p in attacker.parameters()) == 8_520_962  # as counted in their code
    errors = torch.rand(3, 4, 64, 64)
    assert attacker(errors).shape == (3, 2)
    assert not torch.equal(attacker(errors), attacker(errors))  # dropout
    attacker.eval()
    assert torch.equal(attacker(errors), attacker(errors))
