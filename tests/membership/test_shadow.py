"""Shadow LoRAs: halves, settings read from a file, training, resuming, a cluster."""

from __future__ import annotations

import json
import pickle
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffward.data import random_split
from diffward.errors import InputError, TrainingError
from diffward.finetune.settings import Settings
from diffward.lora import open_lora, write_lora
from diffward.membership import shadow_train
from diffward.membership.attacks.lira import lira, lira_offline
from diffward.membership.attacks.rmia import rmia
from diffward.membership.bank import Pairs
from diffward.membership.shadow import (
    build_shadows,
    halves,
    shadow_settings,
)
from diffward.models.features import encode_pictures

ONLINE = {"lira": lira, "rmia": rmia}
ALL = {**ONLINE, "lira_offline": lira_offline}


# --- halves ------------------------------------------------------------------------------------


class Named:
    """Only what dividing pictures asks of them."""

    def __init__(self, hashes):
        self.hashes = hashes

    def __len__(self):
        return len(self.hashes)


def named(n):
    return Named([f"{(i * 7919) % 10007:064x}" for i in range(n)])


def test_halves_are_complements_and_keep_groups_together():
    groups = np.arange(101) // 3
    inside = halves(named(101), 8, seed=3, groups=groups)
    assert inside.shape == (8, 101) and inside.dtype == bool
    assert (inside[0::2] == ~inside[1::2]).all()
    assert (inside.sum(0) == 4).all()
    assert (np.abs(inside.sum(1) - 50.5) <= 2).all()
    for group in range(groups.max() + 1):
        assert (inside[:, groups == group].std(axis=1) == 0).all()
    # Random: no two divisions alike, each picture as often on one side as on the other.
    many = halves(named(60), 400, seed=0, groups=np.arange(60))[0::2]
    assert len({row.tobytes() for row in many}) == 200
    assert np.abs(many.mean(0) - 0.5).max() < 0.15


def test_halves_depend_on_the_seed_alone():
    pictures, groups = named(40), np.arange(40) // 2
    inside = halves(pictures, 8, 1, groups)
    assert np.array_equal(inside, halves(pictures, 8, 1, groups))
    assert not np.array_equal(inside, halves(pictures, 8, 2, groups))
    assert np.array_equal(inside, halves(pictures, 12, 1, groups)[:8])
    order = np.random.default_rng(0).permutation(40)
    shuffled = Named([pictures.hashes[i] for i in order])
    assert np.array_equal(inside[:, order], halves(shuffled, 8, 1, groups[order] + 5))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_half_is_the_audited_split(seed, pictures):
    """The split of the audited LoRA may have been drawn from the same seed."""
    many = named(40)
    drawn = np.random.default_rng(seed).permutation(40)
    order = np.argsort(many.hashes)
    member = np.zeros(40, dtype=bool)
    member[order[drawn[:20]]] = True
    agree = (halves(many, 8, seed, np.arange(40)) == member).mean(1)
    assert (np.abs(agree - 0.5) < 0.4).all()
    assert random_split(pictures, seed=seed).members  # near-duplicates are looked for
    assert halves(pictures, 4, seed).shape == (4, 6)


def test_near_duplicates_are_found(pictures):
    copies = pictures.at([0, 1, 2, 3, 4, 5, 1, 1])
    for half in halves(copies, 4, 0):
        assert half[1] == half[6] == half[7]
    with pytest.raises(InputError, match="near-duplicates"):
        halves(pictures.at([1, 1, 1]), 4, 0)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_a_number_of_shadows_that_cannot_be(count):
    with pytest.raises(InputError, match=f"--shadows {count}"):
        halves(named(10), count, 0, np.arange(10))


# --- settings of a file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, text_encoder",
    [("attention", False), ("attention+ff", True), ("all", False), ("attn2.to_k,attn2.to_v", False),
     ("to_q,attn2.to_k,ff.net.2,conv_in", False)],
)  # fmt: skip
def test_settings_are_read_from_the_file(tiny_denoiser, tmp_path, targets, text_encoder):
    denoiser = tiny_denoiser()
    told = Settings(rank=3, alpha=1.5, targets=targets, text_encoder=text_encoder)
    denoiser.inject(3, 1.5, told.target_modules(), text_encoder=text_encoder)
    weights = denoiser.trainable_adapter.weights()
    denoiser.detach()
    write_lora(weights, tmp_path / "a.safetensors", "kohya")
    loaded = open_lora(tmp_path / "a.safetensors").load().resolve(denoiser.module_shapes())
    found = shadow_settings(loaded, 12.5, lr=2e-3, batch=4, seed=9)
    assert (found.rank, found.alpha, found.text_encoder) == (3, 1.5, text_encoder)
    assert (found.epochs, found.lr, found.batch, found.seed) == (12.5, 2e-3, 4, 9)
    if "," not in targets:
        assert found.targets == targets
    denoiser.inject(3, 1.5, found.target_modules(), text_encoder=found.text_encoder)
    assert set(denoiser.trainable_adapter.weights().modules) == set(weights.modules)


def test_settings_of_a_file_without_a_unet(tiny_denoiser):
    denoiser = tiny_denoiser()
    denoiser.inject(2, 2.0, ["to_q"], text_encoder=True)
    weights = denoiser.trainable_adapter.weights()
    weights.modules = {n: m for n, m in weights.modules.items() if n.startswith("text")}
    with pytest.raises(InputError, match="UNet"):
        shadow_settings(weights, 10)


# --- training on the tiny pipeline -------------------------------------------------------------


QUICK = Settings(epochs=2, batch=2, rank=2, alpha=2.0, lr=2e-2, seed=4)  # 3 steps


@pytest.fixture
def counted(monkeypatch):
    """How many LoRAs each call of `train_many` was asked for."""
    calls, real = [], shadow_train.train_many

    def counting(denoiser, jobs, **options):
        calls.append(len(jobs))
        return real(denoiser, jobs, **options)

    monkeypatch.setattr(shadow_train, "train_many", counting)
    return calls


def build(denoiser, pictures, folder, count=4, settings=QUICK, **options):
    features = options.pop("features", None) or encode_pictures(denoiser, pictures)
    return build_shadows(
        denoiser, features, pictures, Pairs.draw(denoiser, 4), settings, folder, count=count, **options
    )  # fmt: skip


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def test_shadows_are_what_they_say(denoiser, pictures, tmp_path, counted):
    """Halves of the pictures, trained one by one by the loop; errors by a loop over pictures and pairs."""
    from diffward.finetune import METHODS, train

    features = encode_pictures(denoiser, pictures)
    found = build(denoiser, pictures, tmp_path / "s", seed=1)
    assert np.array_equal(found.inside, halves(pictures, 4, 1)) and counted == [4]
    assert found.errors.shape == (4, 6, 4) and found.gain.dtype == np.float64
    np.testing.assert_allclose(found.gain, (found.base - found.errors).mean(2))
    pairs = Pairs.draw(denoiser, 4)
    told = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert told["steps"] == 3
    starts = set()
    for s in (0, 3):
        rows = torch.from_numpy(np.flatnonzero(found.inside[s]))
        part = replace(
            features, latents=features.latents[rows], captions=[features.captions[r] for r in rows],
            names=[features.names[r] for r in rows], _caption_index=features._caption_index[rows],
        )  # fmt: skip
        seed = shadow_settings_seed(4, 1, s)
        starts.add(seed)
        alone = train(denoiser, part, METHODS["plain"].obj(), replace(QUICK, steps=3, seed=seed))
        weights = open_lora(tmp_path / "s" / f"shadow-00{s}.safetensors").load()
        for name, module in alone.weights.modules.items():
            np.testing.assert_allclose(weights.modules[name].delta(), module.delta(), atol=2e-5)
        denoiser.attach(weights)
        with torch.no_grad():
            for n in range(6):
                for k in range(4):
                    error = denoiser.errors(
                        features.latents[[n]], pairs.t[[k]], pairs.eps[[k]],
                        features.conditioning(torch.tensor([n])),
                    )  # fmt: skip
                    assert float(error.mean()) == pytest.approx(found.errors[s, n, k], rel=1e-4)
    assert len(starts) == 2
    assert np.abs(found.errors[0] - found.errors[3]).max() > 1e-5


def shadow_settings_seed(*numbers):
    from diffward.membership.shadow import _start

    return _start(*numbers)


def test_with_the_text_encoder_they_are_trained_one_by_one(denoiser, pictures, tmp_path, counted):
    found = build(denoiser, pictures, tmp_path / "s", settings=replace(QUICK, text_encoder=True))
    assert not counted and np.isfinite(found.gain).all() and found.gain.any()
    assert {f.suffix for f in (tmp_path / "s").iterdir()} == {".json", ".safetensors"}
    told = open_lora(tmp_path / "s" / "shadow-000.safetensors").load()
    assert sorted(told.components) == ["text_encoder", "unet"]


def test_what_was_attached_is_attached_again(denoiser, pictures, tmp_path):
    denoiser.inject(2, 2.0, ["to_q"], text_encoder=False, init=False)  # not zero from the start
    weights = denoiser.trainable_adapter.weights()
    denoiser.attach(weights)
    features = encode_pictures(denoiser, pictures)
    args = (features.latents[:2], torch.tensor([100, 500]), features.conditioning(torch.arange(2)))
    before = denoiser.predict(*args)
    build(denoiser, pictures, tmp_path / "s", attached=weights)
    assert torch.equal(denoiser.predict(*args), before)
    with pytest.raises(InputError):
        build(denoiser, pictures, tmp_path / "s", attached=weights, settings=replace(QUICK, rank=3))
    assert torch.equal(denoiser.predict(*args), before)
    build(denoiser, pictures, tmp_path / "s")
    assert denoiser._adapter is None


def test_nothing_is_done_twice(tiny_denoiser, pictures, tmp_path, counted, monkeypatch):
    first = build(tiny_denoiser(), pictures, tmp_path / "s")
    made = files(tmp_path / "s")
    assert set(made) == {f"shadow-00{s}.safetensors" for s in range(4)}
    fresh = tiny_denoiser()
    again = build(fresh, pictures, tmp_path / "s")
    assert counted == [4] and fresh.evaluations == 0  # errors come from the cache
    assert np.array_equal(first.gain, again.gain)
    (tmp_path / "s" / "shadow-002.safetensors").unlink()
    build(tiny_denoiser(), pictures, tmp_path / "s")
    assert counted == [4, 1]
    monkeypatch.setitem(shadow_train.MOST, None, 1)
    more = build(tiny_denoiser(), pictures, tmp_path / "s", count=6)
    assert counted == [4, 1, 1, 1]
    np.testing.assert_allclose(more.gain[:4], first.gain, atol=1e-5)
    assert np.array_equal(more.inside[:4], first.inside)
    left = {f.name for f in (tmp_path / "s").iterdir()}
    assert left == {"manifest.json", *(f"shadow-00{s}.safetensors" for s in range(6))}


def test_a_stopped_run_goes_on(tiny_denoiser, pictures, tmp_path, monkeypatch):
    build(tiny_denoiser(), pictures, tmp_path / "whole")
    real, steps = shadow_train.train_many, []

    def stopping(denoiser, jobs, **options):
        def on_step(done, adapter):
            steps.append(done)
            if done == stop:
                raise KeyboardInterrupt

        return real(denoiser, jobs, on_step=on_step, **options)

    monkeypatch.setattr(shadow_train, "train_many", stopping)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        build(tiny_denoiser(), pictures, tmp_path / "s")
    assert not files(tmp_path / "s")
    (tmp_path / "s" / "training-0.pt").write_bytes(b"of a group that is no more")
    stop, steps[:] = None, []
    build(tiny_denoiser(), pictures, tmp_path / "s")
    assert steps == [3]  # not from the start
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    assert not list((tmp_path / "s").glob("*.pt"))


def test_another_runs_folder_is_refused(tiny_denoiser, pictures, tmp_path, counted):
    folder, denoiser = tmp_path / "s", tiny_denoiser()
    build(denoiser, pictures, folder)
    before, features = files(folder), encode_pictures(denoiser, pictures)
    told = replace(features, captions=[c + "!" for c in features.captions])
    for word, change in {
        "rank": {"settings": replace(QUICK, rank=4)},
        "start": {"settings": replace(QUICK, seed=5)},
        "seed": {"seed": 1},
        "method": {"method": object()},
        "pictures": {"features": told},
    }.items():
        with pytest.raises(InputError, match=rf"another .*{word}"):
            build(denoiser, pictures, folder, **change)
    with pytest.raises(InputError, match=r"another .*pictures"):
        build(denoiser, pictures.at([0, 1, 3, 4]), folder)
    with pytest.raises(InputError, match="another base;"):
        build(tiny_denoiser(seed=1), pictures, folder)
    assert counted == [4] and files(folder) == before
    build(denoiser, pictures.at([5, 3, 1, 0, 2, 4]), folder)  # the order of the pictures is nothing
    assert counted == [4]


def test_folders_that_are_something_else(denoiser, pictures, tmp_path):
    (tmp_path / "a").mkdir()
    build(denoiser, pictures, tmp_path / "a")  # empty: fine
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "holiday.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        build(denoiser, pictures, tmp_path / "b")
    with pytest.raises(InputError, match="not empty"):
        build(denoiser, pictures, tmp_path / "b" / "holiday.txt")
    (tmp_path / "a" / "manifest.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="cannot be read"):
        build(denoiser, pictures, tmp_path / "a")
    for wrong in ({"tune": "full"}, {"flip": True}):
        with pytest.raises(InputError, match="shadows are LoRAs"):
            build(denoiser, pictures, tmp_path / "c", settings=replace(QUICK, **wrong))
    assert not (tmp_path / "c").exists()


# --- a cluster ---------------------------------------------------------------------------------


class FakeRay(types.ModuleType):
    """Runs tasks at once, on copies of what they are given, as another process would have them."""

    def __init__(self, fail=None):
        super().__init__("ray")
        self.tasks, self.options, self.cancelled, self.started, self.fail = 0, None, [], False, fail

    def init(self, ignore_reinit_error=False):
        self.started = True

    def put(self, value):
        return ("reference", pickle.dumps(value))

    def remote(self, **options):
        self.options = options

        def decorate(function):
            def run(*args):
                self.tasks += 1
                if self.fail == self.tasks:
                    return ("failed", self.tasks)
                args = [a[1] if isinstance(a, tuple) else pickle.dumps(a) for a in args]
                answer = pickle.loads(pickle.dumps(function))(*map(pickle.loads, args))
                return ("done", self.tasks, answer)

            return types.SimpleNamespace(remote=run)

        return decorate

    def wait(self, references, num_returns=1, timeout=None):
        assert self.started and len(references) >= num_returns
        return references[:num_returns], references[num_returns:]

    def get(self, references):
        for state, *_ in references:
            if state == "failed":
                error = TrainingError("a traceback of the worker")
                error.cause = TrainingError("step 3: the loss is not finite")
                raise error
        return [answer for _, _, answer in references]

    def cancel(self, reference):
        self.cancelled.append(reference)


def test_a_cluster_makes_the_same_shadows(tiny_denoiser, pictures, tmp_path, monkeypatch):
    here = build(tiny_denoiser(), pictures, tmp_path / "here")
    monkeypatch.setitem(sys.modules, "ray", ray := FakeRay())
    there = build(tiny_denoiser(), pictures, tmp_path / "there", cluster="ray")
    assert ray.tasks == 2 and ray.options == {"num_gpus": 0}
    np.testing.assert_allclose(here.gain, there.gain, atol=1e-5)
    build(tiny_denoiser(), pictures, tmp_path / "there", cluster="ray")
    assert ray.tasks == 2


def test_a_task_that_fails(tiny_denoiser, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ray := FakeRay(fail=1))
    with pytest.raises(TrainingError, match="step 3: the loss is not finite"):
        build(tiny_denoiser(), pictures, tmp_path / "s", cluster="ray")
    assert ray.cancelled == [("done", 2, None)]


def test_machines_that_do_not_share_the_folder(denoiser, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.setattr("diffward.lora.write_lora", lambda *args: None)
    with pytest.raises(InputError, match="did not write there"):
        build(denoiser, pictures, tmp_path / "s", cluster="ray")


def test_without_ray(denoiser, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install diffward\[cluster\]"):
        build(denoiser, pictures, tmp_path / "s", cluster="ray")
    with pytest.raises(InputError, match="--cluster slurm"):
        build(denoiser, pictures, tmp_path / "s", cluster="slurm")
