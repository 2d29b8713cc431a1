"""The truth is arithmetic on errors and cross-entropies computed apart, and the run that never stopped."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from diffward.finetune import train
from diffward.finetune.gauge import Reading
from diffward.finetune.method import Batch
from diffward.finetune.moment import moments
from diffward.finetune.private import base_errors
from diffward.finetune.settings import GaugeOptions
from tests.finetune.private.helpers import (
    ATTACKED,
    QUICK,
    batch_of,
    flat,
    make,
    make_it_know,
    pieces,
    started,
)
from tests.finetune.test_loop import equal, result

# --- the objectives ----------------------------------------------------------------------------


@pytest.mark.parametrize("share, pressed", [(1.0, 4), (0.5, 2), (0.3, 2), (0.1, 1)])
@pytest.mark.parametrize("name", ATTACKED)
def test_value_and_gradient(tiny_denoiser, features, auxiliary, name, share, pressed):
    method, run = started(tiny_denoiser(), features, auxiliary, name, weight=0.7, share=share)
    batch = batch_of(features, [3, 1, 7, 0])
    if name in ("hinge", "dual"):
        make_it_know(method, run, batch)
    loss, slope, truth = method.loss(run.denoiser, batch), 0, []
    for i in range(4):
        plain, d_plain, ce, d_ce = pieces(method, run, batch, i)
        assert d_ce.any()
        if i >= pressed:
            value, d_value = plain, d_plain
        elif name == "mp":
            value, d_value = plain - 0.7 * ce, d_plain - 0.7 * d_ce
        elif name == "smp":
            below = 1 + 0.7 * ce + 1e-5
            value, d_value = plain / below, d_plain / below - 0.7 * plain / below**2 * d_ce
        else:
            assert ce < math.log(2)
            value, d_value = plain + 0.7 * (math.log(2) - ce), d_plain - 0.7 * d_ce
        truth.append(value)
        slope = slope + d_value / 4
    torch.testing.assert_close(loss.detach(), torch.stack(truth), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(flat(loss.mean(), run), slope, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["hinge", "dual"])
@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_no_pressure_at_chance_or_below(tiny_denoiser, features, auxiliary, name, bias):
    method, run = started(tiny_denoiser(), features, auxiliary, name, weight=5.0, share=1.0)
    last = method.opponent.attacker.layers[-1]
    last.bias.data.fill_(bias)
    if bias == 0:
        last.weight.data.zero_()  # logit 0 for all, but for the rest it would have a slope
    batch = batch_of(features, [3, 1, 7])
    ours = flat(method.loss(run.denoiser, batch).mean(), run)
    plain = flat(make("plain").loss(run.denoiser, batch).mean(), run)
    torch.testing.assert_close(ours, plain, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ATTACKED)
def test_one_by_one_is_all_at_once(tiny_denoiser, features, auxiliary, name):
    method, run = started(tiny_denoiser(), features, auxiliary, name, weight=1.0, share=1.0)
    method.rows(1, 0)
    batch = batch_of(features, [3, 1, 7, 0])
    together = method.loss(run.denoiser, batch)
    alone = [
        method.loss(run.denoiser, Batch(*[x[i : i + 1] for x in vars(batch).values()]))
        for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_the_attacker_itself_gets_no_gradient(tiny_denoiser, features, auxiliary):
    for paper in (False, True):
        method, run = started(tiny_denoiser(), features, auxiliary, "smp", weight=1.0, paper=paper)
        method.loss(run.denoiser, batch_of(features, [3, 1])).mean().backward()
        assert all(p.grad is None for p in method.opponent.attacker.parameters())
        assert any(p.grad.any() for p in run.parameters)


BASES = [
    {},
    {"text_encoder": True},
    {"tune": "full"},
    {"tune": "full", "text_encoder": True},
]


@pytest.mark.parametrize("changes", BASES)
def test_the_base_is_the_untouched_one(tiny_denoiser, features, auxiliary, changes):
    run = started(tiny_denoiser(), features, auxiliary, "hinge", **changes)[1]
    fresh, two = tiny_denoiser(), [(features, [3, 1, 7]), (auxiliary.non_members, [2, 0])]
    batches = [batch_of(f, rows) for f, rows in two]
    moved = [
        replace(b, conditioning=run.denoiser.condition([f.captions[r] for r in b.rows]))
        for b, (f, _) in zip(batches, two, strict=True)
    ]
    found = base_errors(run, *[(f, b) for (f, _), b in zip(two, moved, strict=True)])
    for ours, b in zip(found, batches, strict=True):
        truth = fresh.errors(b.latents, b.t, b.eps, b.conditioning)
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)
    b = moved[0]
    trained = run.denoiser.errors(b.latents, b.t, b.eps, b.conditioning)
    assert not torch.allclose(trained, found[0], atol=1e-2)


# --- dual, early stopping ----------------------------------------------------------------------


def reading(auc=0.5, validation=1.0, step=0):
    return Reading(step, 1.0, validation, 1.0, auc, (0.0, 1.0))


def test_the_path_of_mu(tiny_denoiser, features, auxiliary):
    """Start 0.1, so 0.2 an AUC of 1 above 0.6; by hand."""
    method, run = started(tiny_denoiser(), features, auxiliary, "dual", weight=0.1, target_auc=0.6)
    path = []
    for auc in (0.9, 0.5, 0.0, 0.0, 1.0):
        assert method.read(reading(auc)) == "go"
        path.append(method.mu)
    assert path == pytest.approx([0.16, 0.14, 0.02, 0.0, 0.08])
    assert "mu 0.08" in method.told()
    other = started(tiny_denoiser(), features, auxiliary, "dual", weight=0.1)[0]
    other.load(method.state())
    assert other.mu == method.mu
    batch = batch_of(features, [3, 1])
    make_it_know(method, run, batch)
    at_008 = method.loss(run.denoiser, batch)
    method.mu = 0.16
    at_016 = method.loss(run.denoiser, batch)
    plain = make("plain").loss(run.denoiser, batch)
    torch.testing.assert_close(at_016 - plain, 2 * (at_008 - plain), atol=1e-5, rtol=1e-3)


def test_early_stopping_keeps_the_best_and_waits():
    method = make("earlystop")
    method.start(SimpleNamespace(settings=replace(QUICK, gauge=GaugeOptions(patience=3))))
    losses = [1.0, 0.8, 0.9, 0.85, 0.7, 0.7, 0.9, 0.8]
    said = [method.read(reading(validation=loss)) for loss in losses]
    assert said == ["keep", "keep", "go", "go", "keep", "go", "go", "stop"]


def test_early_stopping_in_a_run(tiny_denoiser, features, auxiliary):
    """Learnt far too fast: it stops before the end, with the weights of the best reading."""
    settings = replace(
        QUICK, steps=60, lr=5e-2, targets="all", gauge=GaugeOptions(every=2, patience=4, pairs=2)
    )
    denoiser, steps = tiny_denoiser(), {}

    def keep(step, *_):
        steps[step] = result(denoiser)

    outcome = train(
        denoiser, features, make("earlystop"), settings, auxiliary=auxiliary, on_step=keep
    )
    losses = {r.step: r.validation_loss for r in outcome.readings}
    best = min(losses, key=losses.get)
    assert outcome.kept_at == best and outcome.steps == best + 8 < 60
    assert equal(result(denoiser), steps[best])


# --- moment matching ---------------------------------------------------------------------------


@contextlib.contextmanager
def heard(denoiser):
    """Every answer of the denoiser within the block: (t, errors)."""
    answers, ask = [], denoiser.errors

    def errors(latents, t, eps, conditioning):
        answers.append((t, ask(latents, t, eps, conditioning)))
        return answers[-1][1]

    denoiser.errors = errors
    try:
        yield answers
    finally:
        del denoiser.errors


def gaps_by_hand(answers, n):
    """Member minus other in mean and standard deviation of log(e + d) - log(e_base + d)."""
    (t, errors), (t_base, base), (t_others, others) = answers
    assert torch.equal(t_base, torch.cat([t[:n], t[:n]])) and torch.equal(t_others, t[:n])
    assert errors.requires_grad and not base.requires_grad and not others.requires_grad
    e, b, o = (x.detach().double().numpy().mean(axis=(1, 2, 3)) for x in (errors, base, others))
    members, outside = (
        np.log(e[:n] + 1e-3) - np.log(b[:n] + 1e-3),
        np.log(o + 1e-3) - np.log(b[n:] + 1e-3),
    )
    return np.array([members.mean() - outside.mean(), members.std() - outside.std()])


def test_the_penalty_by_hand(tiny_denoiser, features, auxiliary):
    method, run = started(tiny_denoiser(), features, auxiliary, "moment", weight=3.0, share=0.75)
    kept, reach = np.zeros(2), 0.0
    for step in (0, 4, 8):
        method.rows(step, 0)
        batch = batch_of(features, [3, 1, 7, 0], seed=step)
        with heard(run.denoiser) as answers:
            loss = method.loss(run.denoiser, batch)
        gaps = gaps_by_hand(answers, 3)
        kept, reach = 0.9 * kept + 0.1 * gaps, 0.9 * reach + 0.1
        mean = kept / reach
        plain = make("plain").loss(run.denoiser, batch)
        penalty = (loss - plain).detach().numpy()
        np.testing.assert_allclose(penalty, 3 * (mean @ mean), rtol=2e-2, atol=1e-5)
        if step == 0:  # one comparison: the square of the gap itself, gradient and all
            members = moments(answers[0][1][:3], answers[1][1][:3])
            outside = moments(answers[2][1], answers[1][1][3:])
            truth = plain.mean() + 3 * ((members - outside.detach()) ** 2).sum()
            torch.testing.assert_close(
                flat(loss.mean(), run), flat(truth, run), atol=1e-5, rtol=1e-3
            )
        method.after_step(step)
    method.rows(9, 0)  # between comparisons the running gap presses on
    batch = batch_of(features, [2, 5, 8, 0], seed=9)
    with heard(run.denoiser) as answers:
        loss = method.loss(run.denoiser, batch)
    assert len(answers) == 2
    plain = make("plain").loss(run.denoiser, batch)
    members = moments(answers[0][1][:3], answers[1][1])
    truth = plain.mean() + 6 * torch.tensor(mean).float() @ members
    torch.testing.assert_close(flat(loss.mean(), run), flat(truth, run), atol=1e-5, rtol=1e-3)


def test_no_penalty_where_both_are_alike(tiny_denoiser, features, auxiliary):
    method, run = started(tiny_denoiser(), features, auxiliary, "moment", weight=3.0)
    with torch.no_grad():
        for p in run.parameters[1::2]:
            p.zero_()  # the adapter changes nothing, on either side
    batch = batch_of(features, [3, 1, 7, 0])
    plain = make("plain").loss(run.denoiser, batch)
    torch.testing.assert_close(method.loss(run.denoiser, batch), plain, atol=1e-6, rtol=0)
    random = torch.Generator().manual_seed(3)
    e, b = torch.rand(6, 4, 8, 8, generator=random), torch.rand(6, 4, 8, 8, generator=random)
    other = torch.randperm(6, generator=random)
    torch.testing.assert_close(moments(e, b), moments(e[other], b[other]))


# --- paper mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["mp", "smp"])
def test_paper_mode_is_the_equation(tiny_denoiser, features, auxiliary, name, size):
    method, run = started(tiny_denoiser(), features, auxiliary, name, paper=True, batch=size)
    batch, logits = batch_of(features, [3, 1, 7][:size]), []
    attacker = method.opponent.attacker
    assert attacker.training and attacker.layers[0].in_features == 4 * 8 * 8
    attacker.register_forward_hook(lambda module, inputs, out: logits.append((inputs[0], out)))
    with heard(run.denoiser) as answers:
        loss = method.loss(run.denoiser, batch)
    (t, first), (t_again, again) = answers
    assert first.shape == again.shape and not torch.equal(t, t_again)
    assert torch.equal(logits[0][0], again) and logits[0][1].shape == (size, 2)
    plain = first.mean(dim=(1, 2, 3))
    ce = cross_entropy(logits[0][1], torch.ones(size, dtype=torch.long), reduction="none")
    truth = (
        (plain - 0.05 * ce).mean() if name == "mp" else plain.mean() / (1 + 0.05 * ce.mean() + 1e-5)
    )
    assert loss.shape == (size,)
    torch.testing.assert_close(loss.mean(), truth, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(flat(loss.mean(), run), flat(truth, run), atol=1e-6, rtol=1e-4)
