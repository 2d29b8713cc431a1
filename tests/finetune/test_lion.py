"""Lion against its formula written out, and the ways of starting A; stacked is one by one."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffward.errors import InputError
from diffward.finetune import Settings, train
from diffward.finetune.lion import Lion
from diffward.finetune.many import Job, train_many
from tests.finetune.stops import Plain, StopAfter, stop_at
from tests.finetune.test_many import (
    assert_alike,
    doubled,
    in_double,
    one_by_one,
    same,
    with_settings,
)

__all__ = ["in_double"]  # a fixture
QUICK = Settings(
    steps=4, batch=2, rank=2, alpha=3.0, lr=1e-3, seed=5, optimizer="lion", init="gaussian"
)
LRS, DECAYS = [1e-2, 3e-4, 0.5], [0.0, 0.01, 0.3]


@pytest.fixture
def jobs(features):
    """Three jobs with nothing in common but the batch and the optimizer."""
    return [
        Job(features, QUICK, repeats=[2, 1, 1, 3, 1, 1]),
        Job(features.of(range(4)), replace(QUICK, seed=6, rank=4, alpha=4.0, lr=3e-4, steps=6, schedule="cosine",
            warmup=2, clip=0.02, weight_decay=0.3)),
        Job(features, replace(QUICK, seed=7, rank=1, alpha=2.0, clip=0.0, steps=2, drop_caption=0.4, init="uniform")),
    ]  # fmt: skip


def by_hand(x, gradients, rates, decay, beta1=0.9, beta2=0.99):
    """Algorithm 2 of arXiv 2302.06675, one number at a time."""
    x, m = x.clone().double(), torch.zeros_like(x).double()
    flat, mean = x.view(-1), m.view(-1)
    for gradient, lr in zip(gradients, rates, strict=True):
        for i, g in enumerate(gradient.double().view(-1).tolist()):
            c = beta1 * float(mean[i]) + (1 - beta1) * g
            flat[i] -= lr * ((c > 0) - (c < 0) + decay * float(flat[i]))
            mean[i] = beta2 * float(mean[i]) + (1 - beta2) * g
    return x


def test_is_the_formula():
    torch.manual_seed(0)
    start = [torch.randn(4, 5), torch.randn(7)]
    # In the third step a gradient of zero: the momentum alone decides.
    gradients = [[torch.randn_like(p) * (0 if k == 2 else 1) for k in range(6)] for p in start]
    rates = [1e-2, 1e-2, 3e-3, 1e-2, 1e-1, 1e-2]
    params = [nn.Parameter(p.clone()) for p in start]
    idle = nn.Parameter(torch.ones(3))
    ours = Lion([*params, idle], 1e-2, 0.2)
    for step, lr in enumerate(rates):
        for p, own in zip(params, gradients, strict=True):
            p.grad = own[step].clone()
        ours.param_groups[0]["lr"] = lr
        ours.step()
    for p, begun, own in zip(params, start, gradients, strict=True):
        truth = by_hand(begun, own, rates, 0.2)
        torch.testing.assert_close(p.detach().double(), truth, rtol=1e-5, atol=1e-6)
    assert torch.equal(idle, torch.ones(3))  # without a gradient not even decay


def test_an_entry_without_gradient_stays():
    """Padding of a stack: the sign of zero is zero."""
    p = nn.Parameter(torch.tensor([0.0, 1.0, -1.0]))
    ours = Lion([p], 0.1, 0.0)
    for _ in range(3):
        p.grad = torch.tensor([0.0, 1e-20, -3.0])
        ours.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.0, 0.7, -0.7]))


def test_a_stack_is_each_alone():
    torch.manual_seed(0)
    start = [torch.randn(3, 4, 5), torch.randn(3, 4, 7)]
    stacked = [nn.Parameter(p.clone()) for p in start]
    ours = Lion(stacked, LRS, DECAYS)
    alone = [[nn.Parameter(p[k].clone()) for p in start] for k in range(3)]
    theirs = [Lion(ps, lr, decay) for ps, lr, decay in zip(alone, LRS, DECAYS, strict=True)]
    for step in range(6):
        moving = 3 if step < 4 else 1  # two come to their end
        gradients = [torch.randn_like(p) for p in start]
        for p, g in zip(stacked, gradients, strict=True):
            p.grad = g.clone()
        ours.param_groups[0]["lr"] = [lr * (step + 1) for lr in LRS[:moving]]
        ours.step()
        for k in range(moving):
            for p, g in zip(alone[k], gradients, strict=True):
                p.grad = g[k].clone()
            theirs[k].param_groups[0]["lr"] = LRS[k] * (step + 1)
            theirs[k].step()
        if step == 2:  # saved and taken up again
            buffer = io.BytesIO()
            torch.save(ours.state_dict(), buffer)
            buffer.seek(0)
            ours = Lion(stacked, [1.0] * 3, [1.0] * 3)
            ours.load_state_dict(torch.load(buffer, weights_only=True))
        for k in range(3):
            for p, q in zip(stacked, alone[k], strict=True):
                torch.testing.assert_close(p[k].detach(), q.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_is_training_one_by_one(in_double, jobs, targets):
    """In double precision: the sign of a gradient near zero is a matter of rounding."""
    jobs = doubled(with_settings(jobs, targets=targets))
    outcome = train_many(in_double(), jobs)
    for ours, alone in zip(outcome, one_by_one(in_double, jobs), strict=True):
        assert (ours.steps, ours.exposure) == (alone.steps, alone.exposure)
        assert ours.losses == pytest.approx(alone.losses, rel=1e-10)
        assert_alike(ours.weights, alone.weights, 1e-9)


def test_every_entry_moves_by_the_rate(tiny_denoiser, features):
    """One step from B = 0 without decay: all of B is +lr, -lr, or 0 where there was no gradient."""
    settings = replace(QUICK, steps=1, weight_decay=0.0)
    for optimizer, lion in (("lion", True), ("adamw", False)):
        outcome = train(tiny_denoiser(), features, Plain(), replace(settings, optimizer=optimizer))
        ups = torch.cat([m.tensors["up"].flatten() for m in outcome.weights.modules.values()])
        exact = torch.isclose(ups.abs(), torch.tensor(1e-3), rtol=1e-6, atol=0) | (ups == 0)
        assert bool(ups.any()) and bool(exact.all()) == lion


def test_resumed_is_uninterrupted(denoiser, jobs, tmp_path):
    file = tmp_path / "state.pt"
    straight = train_many(denoiser, jobs)
    for stop in (stop_at(1), stop_at(3)):
        with pytest.raises(KeyboardInterrupt):
            train_many(denoiser, jobs, checkpoint=file, on_step=stop)
    with pytest.raises(KeyboardInterrupt):  # within step 4
        train_many(denoiser, jobs, method=StopAfter(0), checkpoint=file)
    assert torch.load(file)["step"] == 3
    for one, other in zip(straight, train_many(denoiser, jobs, checkpoint=file), strict=True):
        assert one.losses == other.losses and same(one.weights, other.weights)
    for change in ({"optimizer": "adamw"}, {"init": "uniform"}):
        with pytest.raises(InputError, match=f"of a run with another .*{next(iter(change))}"):
            train_many(denoiser, with_settings(jobs, **change), checkpoint=file)


def test_what_is_padded_stays_zero(denoiser, jobs):
    def look(step, adapter):
        for layer in adapter.layers.values():
            for k, rank in enumerate(layer.ranks):
                assert not layer.down[k, rank:].any() and not layer.up[k, rank:].any()

    train_many(denoiser, jobs, on_step=look)


def test_one_optimizer_a_stack(denoiser, jobs):
    mixed = [jobs[0], *with_settings(jobs[1:], optimizer="adamw")]
    with pytest.raises(InputError, match=r"^job 1: --optimizer adamw: must be lion as in job 0$"):
        train_many(denoiser, mixed)


# --- the start of A --------------------------------------------------------------------------------


def start_of(denoiser, features, **changes):
    """The factors before the first step."""
    found = []
    job = Job(features, replace(QUICK, targets="all", **changes))

    def keep(step, adapter):
        found.append(adapter.weights(0))
        return True

    train_many(denoiser, [job], on_step=keep)
    return found[0].modules


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_gaussian_is_that_of_diffusers_scripts(denoiser, features, rank):
    """train_dreambooth_lora.py and the others: LoraConfig(init_lora_weights="gaussian"), so N(0, 1/r^2)."""
    modules = start_of(denoiser, features, rank=rank, alpha=float(rank))
    downs = torch.cat([m.tensors["down"].flatten() for m in modules.values()])
    error = 1 / rank / (2 * len(downs)) ** 0.5
    assert abs(float(downs.std()) - 1 / rank) < 5 * error and abs(float(downs.mean())) < 8 * error
    beyond = float((downs.abs() > 2 / rank).float().mean())
    assert 0.03 < beyond < 0.06  # 4.6 % of a normal distribution; a uniform of that width has none
    assert all(not m.tensors["up"].any() for m in modules.values())


def test_uniform_is_that_of_a_linear_layer(denoiser, features):
    for name, module in start_of(denoiser, features, init="uniform", rank=16).items():
        down = module.tensors["down"]
        bound = down[0].numel() ** -0.5
        assert 0.9 * bound < float(down.abs().max()) <= bound, name
        assert float(down.std()) == pytest.approx(bound / 3**0.5, rel=0.2), name
        assert not module.tensors["up"].any()


def test_the_start_depends_on_the_seed_alone(denoiser, features):
    one = start_of(denoiser, features)
    torch.rand(5)
    again, other = start_of(denoiser, features), start_of(denoiser, features, seed=9)
    for name, module in one.items():
        assert torch.equal(module.tensors["down"], again[name].tensors["down"])
        assert not torch.equal(module.tensors["down"], other[name].tensors["down"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimizer": "sgd"}, "--optimizer sgd: choose adamw or lion"),
        ({"optimizer": "Lion"}, "--optimizer Lion: choose adamw or lion"),
        ({"init": "zeros"}, "--init zeros: choose uniform or gaussian"),
        ({"init": ""}, "--init : choose uniform or gaussian"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        replace(QUICK, **change)
