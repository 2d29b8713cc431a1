"""What the attacker sees, and whole runs against the run that never stopped."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffward.errors import InputError, TrainingError
from diffward.finetune import METHODS, Settings, opponent, train
from diffward.finetune.gauge import Reading
from diffward.finetune.loop import _trainable, check_options
from diffward.finetune.method import Auxiliary, Run
from diffward.finetune.sampler import Sampler
from diffward.finetune.settings import DP, GaugeOptions, Privacy
from diffward.models.features import Features
from tests.finetune.private.helpers import (
    ATTACKED,
    OURS,
    QUICK,
    batch_of,
    make,
    started,
)
from tests.finetune.stops import stop_at
from tests.finetune.test_loop import equal, result

# --- what the attacker sees --------------------------------------------------------------------


class Numbers(nn.Module):
    """A denoiser whose error tells the picture's number, which is what its latent is filled with."""

    device, latent_shape = torch.device("cpu"), (4, 8, 8)
    schedule = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))

    def __init__(self):
        super().__init__()
        self.scale, self.on = nn.Parameter(torch.ones(())), True

    @contextlib.contextmanager
    def adapter(self, on):
        self.on = on
        yield
        self.on = True

    def errors(self, latents, t, eps, conditioning):
        return latents * (self.scale if self.on else 1.0)


def numbered(numbers):
    latents = torch.tensor(numbers).float().view(-1, 1, 1, 1).expand(-1, 4, 8, 8).clone()
    names = [str(n) for n in numbers]
    return Features(latents, names, names, torch.zeros(1, 1, 1), torch.zeros(len(numbers)).long())


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_it_learns_from_auxiliary_pictures_alone(paper, every, monkeypatch):
    monkeypatch.setattr(opponent, "SPACING", 2)
    denoiser, pictures = Numbers(), numbered(range(100, 112))
    auxiliary = Auxiliary(
        torch.tensor([2, 5, 11]), numbered([200, 201, 202]), torch.tensor([0, 1, 3]), numbered([300, 301])
    )  # fmt: skip
    settings = replace(QUICK, privacy=Privacy(paper=paper, every=every, share=0.5))
    run = Run(denoiser, pictures, settings, [denoiser.scale], list(range(12)), 60, auxiliary)
    method, seen = make("smp"), {0: set(), 1: set()}
    method.start(run)

    def learns(module, inputs):
        if not next(module.parameters()).requires_grad:
            return
        maps = inputs[0].flatten(1)[:, 0].round().long().tolist()
        for side, numbers in zip(
            (0, 1), (maps[: len(maps) // 2], maps[len(maps) // 2 :]), strict=True
        ):
            seen[side].update(numbers)

    if paper:
        method.opponent.attacker.register_forward_pre_hook(learns)
    else:
        replay = method.opponent.replay
        add = replay.add

        def spy(features, side, step):
            seen[side].update(features[:, 0].exp().round().long().tolist())  # its mean error
            add(features, side, step)

        monkeypatch.setattr(replay, "add", spy)
    draw = Sampler(denoiser, pictures, settings, run.order, 0, 1)
    for step in range(40):
        assert method.rows(step, 0) is None
        assert method.loss(denoiser, draw(step, 0)).shape == (4,)
        method.after_step(step)
    assert seen == {0: {200, 201, 202}, 1: {102, 105, 111}}


def test_it_learns_what_there_is_to_learn(monkeypatch):
    """Members' errors are a tenth lower than the base's, others' are not: told after some steps."""

    class Planted(Numbers):
        def errors(self, latents, t, eps, conditioning):
            member = (latents[:, :1, :1, :1] < 150).float()
            gain = 1 - 0.1 * member * self.on
            return 0.1 * eps**2 * gain * (self.scale if self.on else 1.0)

    denoiser, pictures = Planted(), numbered(range(100, 116))
    auxiliary = Auxiliary(
        torch.arange(0, 16, 2), numbered(range(200, 208)), torch.tensor([1, 3]), numbered([300, 301])
    )  # fmt: skip
    settings = replace(QUICK, privacy=Privacy(attacker_lr=1e-2))
    run = Run(denoiser, pictures, settings, [denoiser.scale], list(range(16)), 400, auxiliary)
    method = make("hinge")
    method.start(run)
    draw = Sampler(denoiser, pictures, settings, run.order, 0, 1)
    assert method.told() == "attacker 0.50"
    for step in range(200):
        method.rows(step, 0)
        loss = method.loss(denoiser, draw(step, 0))
        method.after_step(step)
    assert float(method.told().split()[1]) > 0.8
    assert (loss[:2] > 0.2 * 0.01).all()


def test_what_is_old_is_forgotten():
    replay = opponent.Replay(3, torch.device("cpu"))
    for step in range(6):
        replay.add(torch.full((2, 3), float(step)), step % 2, step)
    assert opponent.Replay(3, torch.device("cpu")).draw(4, torch.Generator()) is None
    replay.forget(3)
    features, sides = replay.draw(4, torch.Generator())
    assert sorted(features[:, 0].tolist()) == [4, 4, 5, 5] and sides.tolist() == [1, 1, 0, 0]
    assert features[:, 0].tolist() == [5, 5, 4, 4]


# --- whole runs --------------------------------------------------------------------------------

RUNS = {
    **{name: (name, {}) for name in (*OURS, "earlystop")},
    "mp, paper": ("mp", {"privacy": Privacy(paper=True, attacker_lr=1e-3)}),
    "smp, paper": ("smp", {"privacy": Privacy(paper=True, attacker_lr=1e-3), "accumulate": 2}),
    "hinge, full": ("hinge", {"tune": "full", "lr": 1e-3}),
    "smp, full with text": ("smp", {"tune": "full", "text_encoder": True, "lr": 1e-3}),
    "moment, text": ("moment", {"text_encoder": True, "accumulate": 2}),
    "smp, drop captions": ("smp", {"drop_caption": 0.4, "privacy": Privacy(every=2)}),
    "dual, checkpointing": ("dual", {"gradient_checkpointing": True, "accumulate": 2}),
    "mp, one picture": ("mp", {"batch": 1}),
    "smp, one picture": ("smp", {"batch": 1}),
    "hinge, one picture": ("hinge", {"batch": 1}),
    "moment, one picture": ("moment", {"batch": 1}),
    "smp, paper, one picture": ("smp", {"batch": 1, "privacy": Privacy(paper=True)}),
}


def leaves(state):
    if isinstance(state, dict):
        return [leaf for key in sorted(state, key=str) for leaf in leaves(state[key])]
    if isinstance(state, (list, tuple)):
        return [leaf for part in state for leaf in leaves(part)]
    return [state.clone() if isinstance(state, torch.Tensor) else state]


def alike(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted(tiny_denoiser, features, auxiliary, tmp_path, monkeypatch, name):
    monkeypatch.setattr(opponent, "SPACING", 2)
    name, changes = RUNS[name]
    settings = replace(QUICK, **changes)
    straight, method = tiny_denoiser(), make(name)
    outcome = train(straight, features, method, settings, auxiliary=auxiliary)

    file = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_denoiser(), features, make(name), settings, auxiliary=auxiliary, checkpoint=file, on_step=stop_at(5)
        )  # fmt: skip
    torch.rand(7)
    resumed, again = tiny_denoiser(), make(name)
    seen = []
    losses = train(
        resumed, features, again, settings, auxiliary=auxiliary, checkpoint=file, on_step=seen.append
    ).losses  # fmt: skip
    assert seen[0] == 6 and losses == outcome.losses
    assert equal(result(resumed), result(straight))
    assert alike(leaves(again.state()), leaves(method.state()))
    if name in ATTACKED:  # there was something to take up again
        kept = torch.load(file, weights_only=True)["parts"]["method"]["opponent"]
        assert kept["optimizer"]["state"] and any(v.any() for v in kept["attacker"].values())


@pytest.mark.parametrize("name", [*OURS, "mp, paper"])
def test_an_interrupted_step_leaves_no_trace(tiny_denoiser, features, auxiliary, name):
    """A step that is stopped before it moved the weights is taken again after resuming."""
    name, *paper = name.split(", ")
    method, run = started(tiny_denoiser(), features, auxiliary, name, paper=bool(paper))
    before = leaves(method.state())
    method.rows(0, 0)
    method.loss(run.denoiser, batch_of(features, [1, 4, 0]))
    assert alike(leaves(method.state()), before)
    method.after_step(0)
    assert not alike(leaves(method.state()), before)


def test_a_sum_that_runs_away_is_stopped(tiny_denoiser, features, auxiliary):
    """An attacker that learns once and is then left alone can be told ever greater nonsense."""
    settings = replace(QUICK, steps=30, lr=0.1, targets="all", batch=8)
    alone = Privacy(weight=100.0, paper=True, every=1000, attacker_lr=0.1)
    says = r"^step \d+: the sum runs away .* lower --privacy.weight 100, or use smp or hinge$"
    with pytest.raises(TrainingError, match=says):
        train(
            tiny_denoiser(), features, make("mp"), replace(settings, privacy=alone), auxiliary=auxiliary
        )  # fmt: skip
    for name, privacy in (("smp", alone), ("mp", Privacy(weight=0.01, share=1.0))):
        mild = replace(settings, privacy=privacy)
        assert train(tiny_denoiser(), features, make(name), mild, auxiliary=auxiliary).steps == 30


@pytest.mark.parametrize(
    "loss, ce, stops",
    [(lambda i: 1.0, lambda i: 0.2 * i, True), (lambda i: 1 + 0.2 * i, lambda i: 0.7, True), (lambda i: 1.0, lambda i: 5.0, False)],
)  # fmt: skip
def test_what_counts_as_running_away(tiny_denoiser, features, auxiliary, loss, ce, stops):
    method, _ = started(tiny_denoiser(), features, auxiliary, "mp", batch=2)
    stopped = None
    for step in range(150):
        method.objective(torch.full((2,), loss(step)), torch.full((2,), ce(step)))
        try:
            method.after_step(step)
        except TrainingError:
            stopped = step
            break
    assert (stopped is not None) == stops
    if stops:  # means over 100 samples: neither at the first nor long after
        assert 40 < stopped < 140


@pytest.mark.parametrize("name", [*OURS, "earlystop", "smp, paper"])
def test_nothing_of_the_attacker_leaves_with_the_model(
    tiny_denoiser, features, pictures, auxiliary, name
):
    name, *paper = name.split(", ")
    settings = replace(QUICK, steps=2, privacy=Privacy(paper=bool(paper)))
    ours = train(tiny_denoiser(), features, make(name), settings, auxiliary=auxiliary)
    plain = train(tiny_denoiser(), features, make("plain"), replace(QUICK, steps=2))
    assert list(ours.weights.modules) == list(plain.weights.modules)
    for module, other in zip(
        ours.weights.modules.values(), plain.weights.modules.values(), strict=True
    ):
        assert {k: v.shape for k, v in module.tensors.items()} == {
            k: v.shape for k, v in other.tensors.items()
        }
    # What it says of itself is the same whatever the pictures.
    others = pictures.of(range(8, 18))
    again = train(tiny_denoiser(), others, make(name), settings, auxiliary=auxiliary)
    assert again.facts == ours.facts
    assert set(ours.facts) <= {"ss_privacy_method", "ss_privacy_weight", "ss_privacy_target_auc"}


def test_pictures_to_compare_are_asked_for(tiny_denoiser, features):
    for name in (*OURS, "earlystop"):
        with pytest.raises(InputError, match="--holdout"):
            train(tiny_denoiser(), features, make(name), QUICK)


def test_half_precision(tiny_denoiser, features, auxiliary):
    for name in ("smp", "moment"):
        denoiser = tiny_denoiser(dtype=torch.bfloat16)
        outcome = train(
            denoiser, features, make(name), replace(QUICK, steps=3), auxiliary=auxiliary
        )
        assert all(torch.isfinite(p).all() for p in result(denoiser))
        assert all(math.isfinite(loss) for loss in outcome.losses)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("plain", {"dp": DP(epsilon=8.0)}, "--dp.epsilon 8.0: method plain does not .* use dp"),
        ("smp", {"dp": DP(noise=1.0)}, "--dp.noise 1.0: method smp does not .* use dp"),
        ("smp", {"privacy": Privacy(folds=3)}, "--privacy.folds 3: method smp .* use distill"),
        ("hinge", {"privacy": Privacy(paper=True)}, "--privacy.paper True: .* use mp or smp"),
        ("dual", {"privacy": Privacy(paper=True)}, "--privacy.paper True: .* use mp or smp"),
        ("dp", {"privacy": Privacy(weight=1.0)}, "--privacy.weight 1.0: method dp does not look at it"),
        ("moment", {"privacy": Privacy(attacker_lr=1.0)}, "--privacy.attacker-lr 1.0: method moment"),
        ("plain", {"gauge": GaugeOptions(patience=2)}, "--gauge.patience 2: .* use earlystop"),
        ("smp", {"privacy": Privacy(paper=True, share=0.25)}, "--privacy.share 0.25: .* drop --privacy.paper"),
        ("dp", {"dp": DP(noise=1.0), "clip": 0.1}, "--clip 0.1: method dp .* give --dp.clip"),
    ],
)  # fmt: skip
def test_no_option_is_given_in_vain(tiny_denoiser, features, auxiliary, name, given, says):
    with pytest.raises(InputError, match=f"^{says}"):
        train(tiny_denoiser(), features, make(name), replace(QUICK, **given), auxiliary=auxiliary)


def test_every_private_option_has_a_method():
    every = {
        f"{group}.{field}" for group in ("privacy", "dp") for field in vars(getattr(QUICK, group))
    }
    read = frozenset().union(*(entry.obj.options for entry in METHODS))
    assert read == every | {"gauge.patience"}


OTHER = {
    "privacy": Privacy(0.3, True, 1e-3, 0.25, 2, 0.6, 3, "all", 1e-3), "dp": DP(8.0, 1e-3, 2.0, 0.5, "rdp"),
    "gauge": GaugeOptions(patience=2),
}  # fmt: skip
USUAL = Settings()


@pytest.mark.parametrize("name", [entry.name for entry in METHODS])
def test_its_own_options_are_taken(name):
    """Each alone, at another value than the usual one."""
    for option in METHODS[name].obj.options:
        group, field = option.split(".")
        value = getattr(OTHER[group], field)
        usual = getattr(USUAL, group)
        assert value != getattr(usual, field)
        check_options(make(name), replace(USUAL, **{group: replace(usual, **{field: value})}))


class Watched:
    """Options that remember which of them were read."""

    def __init__(self, options):
        self.options, self.read = options, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.options, name)


@pytest.mark.parametrize("name", [*OURS, "mp, paper", "smp, paper"])
def test_the_options_it_names_are_those_it_reads(tiny_denoiser, features, auxiliary, name):
    name, *paper = name.split(", ")
    denoiser, method = tiny_denoiser(), make(name)
    seen = Watched(Privacy(paper=bool(paper)))
    settings = replace(QUICK)
    settings.privacy = seen
    run = Run(
        denoiser, features, settings, _trainable(denoiser, settings), list(range(10)), 10, auxiliary
    )
    method.start(run)
    for step in range(2):
        method.rows(step, 0)
        method.loss(denoiser, batch_of(features, [1, 4, 0]))
        method.after_step(step)
    if name == "dual":
        method.read(Reading(1, 0.1, 0.1, 0.1, 0.5, (0.4, 0.6)))
    told = {option.removeprefix("privacy.") for option in method.reads(settings)}
    assert seen.read - {"paper"} == told - {"paper"}
