"""Readings against a straightforward computation; what is kept, and when a run stops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffward.errors import InputError
from diffward.finetune import Settings, train
from diffward.finetune.method import Auxiliary
from diffward.finetune.settings import GaugeOptions
from tests.finetune.stops import Plain, stop_at
from tests.finetune.test_loop import equal, result

QUICK = Settings(
    steps=6, batch=2, rank=2, lr=2e-2, seed=5, gauge=GaugeOptions(every=2, pictures=3, pairs=4)
)


@pytest.fixture
def auxiliary(features):
    return Auxiliary(
        torch.tensor([0]), features.of([4]), torch.tensor([1, 2]), features.of([4, 5, 0])
    )


def auc_by_counting(members, others):
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    return float(np.mean(pairs))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_reading_is_what_it_says(tiny_denoiser, features, auxiliary, tune):
    """Picture by picture, pair by pair, on the trained model and on an untouched base."""

    class Keeps(Plain):
        def start(self, run):
            run.keep_reference()

    settings = replace(QUICK, tune=tune, lr=2e-3 if tune == "full" else 2e-2)
    denoiser, base = tiny_denoiser(), tiny_denoiser()
    outcome = train(denoiser, features, Keeps(), settings, auxiliary=auxiliary)
    assert [r.step for r in outcome.readings] == [0, 2, 4, 6]
    generator = torch.Generator().manual_seed(0)
    t = ((torch.arange(4) + 0.5) * 250).long()
    eps = torch.randn((4, *denoiser.latent_shape), generator=generator)

    def errors(model, data, row):
        index = torch.tensor([row])
        with torch.no_grad():
            return [
                float(
                    model.errors(
                        data.latents[index], t[k : k + 1], eps[k : k + 1], data.conditioning(index)
                    ).mean()
                )
                for k in range(4)
            ]

    sides = [[(features, 1), (features, 2)], [(auxiliary.validation, i) for i in range(3)]]
    now = [[errors(denoiser, *at) for at in side] for side in sides]
    then = [[errors(base, *at) for at in side] for side in sides]
    last = outcome.readings[-1]
    assert last.member_loss == pytest.approx(np.mean(now[0]), rel=1e-4)
    assert last.validation_loss == pytest.approx(np.mean(now[1]), rel=1e-4)
    assert last.base_validation_loss == pytest.approx(np.mean(then[1]), rel=1e-4)
    gains = [np.mean(np.array(b) - np.array(n), axis=1) for b, n in zip(then, now, strict=True)]
    assert last.auc == pytest.approx(auc_by_counting(*gains))
    assert last.auc_ci95[0] <= last.auc <= last.auc_ci95[1]
    first = outcome.readings[0]
    assert first.auc == 0.5 and first.validation_loss == pytest.approx(first.base_validation_loss)


class KeepsAt(Plain):
    """Keeps the weights of one reading and stops at another."""

    needs_gauge = True

    def __init__(self, keep, stop):
        self.keep, self.last = keep, stop

    def read(self, reading):
        return {self.keep: "keep", self.last: "stop"}.get(reading.step, "go")


KeepsAt.__name__ = "Plain"


def test_the_kept_weights_are_given_and_the_run_stops(tiny_denoiser, features, auxiliary, tmp_path):
    file, seen = tmp_path / "state.pt", {}
    denoiser = tiny_denoiser()
    outcome = train(
        denoiser, features, KeepsAt(2, 4), QUICK, auxiliary=auxiliary, checkpoint=file,
        on_step=lambda step: seen.update({step: result(denoiser)}),
    )  # fmt: skip
    assert (outcome.steps, outcome.kept_at, list(seen)) == (4, 2, [0, 1, 2, 3, 4])
    assert equal(result(denoiser), seen[2]) and not equal(seen[2], seen[4])
    assert outcome.exposure == 2 * 2 / 6
    # Once more: it had stopped, nothing is trained, the same weights are given.
    again = tiny_denoiser()
    told = train(again, features, KeepsAt(2, 4), QUICK, auxiliary=auxiliary, checkpoint=file)
    assert told.readings == outcome.readings and equal(result(again), seen[2])
    other = replace(auxiliary, validation=features.of([5, 4, 0]))
    with pytest.raises(InputError, match="another holdout"):
        train(tiny_denoiser(), features, KeepsAt(2, 4), QUICK, auxiliary=other, checkpoint=file)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resumed_reads_as_uninterrupted(tiny_denoiser, features, auxiliary, tmp_path, stop):
    straight, resumed, file = tiny_denoiser(), tiny_denoiser(), tmp_path / "state.pt"
    outcome = train(straight, features, KeepsAt(4, 99), QUICK, auxiliary=auxiliary)
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_denoiser(), features, KeepsAt(4, 99), QUICK, auxiliary=auxiliary, checkpoint=file,
            on_step=stop_at(stop),
        )  # fmt: skip
    again = train(resumed, features, KeepsAt(4, 99), QUICK, auxiliary=auxiliary, checkpoint=file)
    assert again.readings == outcome.readings and again.kept_at == 4
    assert equal(result(resumed), result(straight))


def test_it_stops_at_a_target(tiny_denoiser, features):
    settings = replace(
        QUICK, steps=200, lr=3e-2, rank=8, targets="all", gauge=replace(QUICK.gauge, stop_auc=0.7)
    )
    held = Auxiliary(torch.tensor([0]), features.of([4]), torch.tensor([0, 1]), features.of([4, 5]))
    outcome = train(tiny_denoiser(), features.of([0, 1]), Plain(), settings, auxiliary=held)
    assert outcome.steps < 200, "the two members were never told apart: the test says nothing"
    assert outcome.readings[-1].auc > 0.7
    below = [r for r in outcome.readings if r.auc <= 0.7]
    assert outcome.kept_at == below[-1].step == outcome.readings[-2].step


def test_without_held_out_pictures_it_is_refused(tiny_denoiser, features):
    with pytest.raises(InputError, match="holdout"):
        train(tiny_denoiser(), features, Plain(), QUICK)
    with pytest.raises(InputError, match="holdout"):
        train(tiny_denoiser(), features, KeepsAt(1, 2), replace(QUICK, gauge=GaugeOptions()))


def test_class_pictures_add_their_loss(tiny_denoiser, features, monkeypatch):
    """DreamBooth: the gradient is that of the members plus `prior_weight` times the class's."""
    caught = []

    def step(self, closure=None):
        caught.append([p.grad.clone() for g in self.param_groups for p in g["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = Settings(steps=1, batch=2, clip=0, tune="full", seed=3, prior_weight=0.7)
    members, prior = features.of([0, 1]), features.of([2, 3, 4])
    seen = []

    class Watched(Plain):
        def loss(self, denoiser, batch):
            seen.append(batch)
            return super().loss(denoiser, batch)

    train(tiny_denoiser(), members, Watched(), settings)
    train(tiny_denoiser(), members, Watched(), replace(settings, prior_weight=0.0), prior=prior)
    train(tiny_denoiser(), members, Watched(), settings, prior=prior)
    alone, none, both = caught
    for a, b in zip(alone, none, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    # The class's part by itself: the same draw, weight one.
    train(tiny_denoiser(), members, Watched(), replace(settings, prior_weight=1.0), prior=prior)
    for a, b, whole in zip(alone, both, caught[3], strict=True):
        torch.testing.assert_close(b - a, 0.7 * (whole - a), atol=1e-6, rtol=1e-3)
    assert len(seen) == 4, "class pictures must not go through the method"
