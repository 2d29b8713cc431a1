"""Teachers never see their fold; the student's loss is the distance to the right teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffward.errors import InputError
from diffward.finetune import METHODS, Settings, train
from diffward.finetune import teachers as module
from diffward.finetune.distill import Distill, folds_of
from diffward.finetune.method import Batch, Run
from diffward.finetune.settings import Privacy, identity_of
from tests.finetune.stops import stop_at
from tests.finetune.test_loop import equal, result

QUICK = Settings(steps=6, batch=2, rank=2, lr=1e-2, seed=5, targets="all")


def test_folds_keep_groups_together():
    groups = [0, 0, 1, 2, 3, 3, 3, 4, 5, 6]
    for seed in range(20):
        fold = folds_of(10, groups, 3, seed)
        assert all(len({int(fold[i]) for i in range(10) if groups[i] == g}) == 1 for g in groups)
        assert sorted((fold == k).sum().item() for k in range(3)) == [3, 3, 4]
    assert any(
        not torch.equal(folds_of(10, None, 2, 0), folds_of(10, None, 2, s)) for s in range(1, 5)
    )
    with pytest.raises(InputError, match="at least 3 pictures that differ"):
        folds_of(4, [0, 0, 1, 1], 3, 0)


def prepared(denoiser, features, settings=QUICK, folder=None, groups=None):
    from diffward.finetune.loop import _trainable

    method, order = Distill(), list(range(len(features)))
    method.precede(denoiser, features, settings, order, folder, groups)
    parameters = _trainable(denoiser, settings)
    method.start(Run(denoiser, features, settings, parameters, order, settings.steps))
    return method


@pytest.fixture
def jobs(monkeypatch):
    """The teachers' jobs, as they are handed to `train_many`."""
    from diffward.finetune import many

    seen = []
    original = many.train_many

    def spy(denoiser, jobs, **options):
        seen.extend(jobs)
        return original(denoiser, jobs, **options)

    monkeypatch.setattr(many, "train_many", spy)
    return seen


def test_the_jobs_hold_the_other_folds(tiny_denoiser, features, jobs):
    settings = replace(QUICK, privacy=Privacy(folds=3))
    method = prepared(tiny_denoiser(), features, settings)
    assert len(jobs) == 3
    assert all((job.settings.targets, job.settings.lr) == ("all", 1e-2) for job in jobs)
    for number, job in enumerate(jobs):
        wanted = features.latents[method.fold != number]
        assert torch.equal(job.features.latents, wanted)


@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        replace(QUICK, targets="text", privacy=Privacy(teacher_targets="all", teacher_lr=3e-2)),
    ],
    ids=["as the student", "more than the student"],
)
def test_the_loss_is_the_distance_to_the_teacher_that_never_saw_it(
    tiny_denoiser, features, settings
):
    denoiser = tiny_denoiser()
    method = prepared(denoiser, features, settings)
    rows = torch.tensor([0, 3, 5, 1])
    generator = torch.Generator().manual_seed(4)
    t = torch.randint(1000, (4,), generator=generator)
    eps = torch.randn((4, *denoiser.latent_shape), generator=generator)
    batch = Batch(features.latents[rows], features.conditioning(rows), t, eps, rows)
    loss = method.loss(denoiser, batch)
    loss.sum().backward()
    assert all(p.grad is not None for p in denoiser.trainable_adapter.parameters())
    assert all(
        layer.lora_A[f"teacher{k}"].weight.grad is None
        for layer in denoiser.trainable_adapter.layers().values()
        for k in (0, 1)
    )
    student = denoiser.trainable_adapter.weights()
    for i, row in enumerate(rows.tolist()):
        said = []
        for weights in (student, method.teachers[int(method.fold[row])]):
            alone = tiny_denoiser()
            alone.attach(weights)
            with torch.no_grad():
                noisy = alone.noise(batch.latents[i : i + 1], t[i : i + 1], eps[i : i + 1])
                said.append(alone.predict(noisy, t[i : i + 1], batch.conditioning[i : i + 1]))
        truth = float(((said[0] - said[1]) ** 2).mean())
        assert float(loss[i].detach()) == pytest.approx(truth, rel=1e-3, abs=1e-9)


def test_the_teachers_are_the_best_that_were_seen(tiny_denoiser, features, monkeypatch):
    """Their validation loss, recomputed alone, is the least in their history."""
    monkeypatch.setattr(module, "LOOKS", 6)
    kept = []
    original = module._Best.finish
    monkeypatch.setattr(module._Best, "finish", lambda self: (kept.append(self), original(self)))
    method = prepared(tiny_denoiser(), features, replace(QUICK, lr=3e-2))
    (best,) = kept
    for number, weights in enumerate(method.teachers):
        assert len(best.losses[number]) == 7
        alone = tiny_denoiser()
        alone.attach(weights)
        errors = []
        for row in best.held[number].tolist():
            index = torch.tensor([row])
            for k in range(module.PAIRS):
                with torch.no_grad():
                    errors.append(
                        alone.errors(
                            features.latents[index], best.pairs.t[k : k + 1], best.pairs.eps[k : k + 1],
                            features.conditioning(index),
                        ).mean()
                    )  # fmt: skip
        truth = float(torch.stack(errors).mean())
        assert min(best.losses[number].values()) == pytest.approx(truth, rel=1e-4)


def test_teachers_may_adapt_more_than_the_student(tiny_denoiser, features):
    settings = replace(
        QUICK, targets="text", privacy=Privacy(teacher_targets="all", teacher_lr=3e-2)
    )
    denoiser = tiny_denoiser()
    before = {name: value.clone() for name, value in denoiser.unet.state_dict().items()}
    method = prepared(denoiser, features, settings)
    own = set(denoiser.trainable_adapter.weights().modules)
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in own)
    assert own < set(method.teachers[0].modules)
    denoiser.detach()
    after = denoiser.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    done = train(tiny_denoiser(), features, Distill(), settings)
    assert set(done.weights.modules) == own
    same = train(tiny_denoiser(), features, Distill(), replace(settings, privacy=Privacy()))
    assert any(
        not torch.equal(m.tensors["up"], same.weights.modules[n].tensors["up"])
        for n, m in done.weights.modules.items()
    )
    with pytest.raises(InputError, match="teacher-targets nothing: no module"):
        nothing = replace(settings, privacy=Privacy(teacher_targets="nothing"))
        train(tiny_denoiser(), features, Distill(), nothing)
    with pytest.raises(InputError, match="teacher-lr"):
        Privacy(teacher_lr=0.0)


def test_the_teachers_own_targets_and_rate_reach_them(tiny_denoiser, features, jobs):
    privacy = Privacy(teacher_targets="attention", teacher_lr=3e-2)
    prepared(tiny_denoiser(), features, replace(QUICK, targets="text", privacy=privacy))
    assert [(job.settings.targets, job.settings.lr) for job in jobs] == [("attention", 3e-2)] * 2


def test_a_run_from_before_the_teachers_options_is_still_itself():
    """What checkpoints and folders of shadows compare, and the hash of the teachers' file."""
    plain, taught = Settings(), Settings(privacy=Privacy(teacher_targets="all", teacher_lr=1e-3))
    assert not {"teacher_targets", "teacher_lr"} & identity_of(plain)["privacy"].keys()
    assert identity_of(taught)["privacy"]["teacher_targets"] == "all"
    assert identity_of(taught)["privacy"]["teacher_lr"] == 1e-3
    assert "teacher" not in repr(plain)


@pytest.mark.parametrize("when", ["teachers", "student"])
def test_resumed_is_uninterrupted(tiny_denoiser, features, tmp_path, monkeypatch, when):
    file = tmp_path / "checkpoint.pt"
    straight = tiny_denoiser()
    train(straight, features, METHODS["distill"].obj(), QUICK)
    if when == "student":
        stop = {"on_step": stop_at(3)}
    else:
        stop = {}
        original = module._Best.after_step

        def interrupted(self, step, adapter):
            if step == 3:
                raise KeyboardInterrupt
            return original(self, step, adapter)

        monkeypatch.setattr(module._Best, "after_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_denoiser(), features, Distill(), QUICK, checkpoint=file, **stop)
    monkeypatch.undo()
    if when == "student":
        monkeypatch.setattr("diffward.finetune.many.train_many", None)  # the teachers are kept
    resumed = tiny_denoiser()
    outcome = train(resumed, features, Distill(), QUICK, checkpoint=file)
    assert equal(result(resumed), result(straight))
    names = set(outcome.weights.modules)
    assert not any("teacher" in name for name in names)
    # Other pictures: the teachers in this folder are not theirs.
    monkeypatch.undo()
    file.unlink()
    with pytest.raises(InputError, match="another data"):
        train(tiny_denoiser(), features.of([5, 4, 3, 2, 1]), Distill(), QUICK, checkpoint=file)


def test_it_says_what_it_cannot(tiny_denoiser, features):
    with pytest.raises(InputError, match="distill"):
        train(tiny_denoiser(), features, Distill(), replace(QUICK, tune="full"))
