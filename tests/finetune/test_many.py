"""The truth is `loop.train` on each job alone, and torch's own AdamW."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffward.errors import InputError, TrainingError
from diffward.finetune import Settings, train
from diffward.finetune.many import Job, group_size, train_many
from diffward.finetune.stacked_adamw import StackedAdamW, clip_each
from diffward.models.stacked import stack
from tests.finetune.stops import Plain, StopAfter, stop_at

QUICK = Settings(steps=4, batch=2, rank=2, alpha=3.0, lr=1e-2, seed=5)


@pytest.fixture
def jobs(features):
    """Three jobs with nothing in common but the batch."""
    few = replace(
        features,
        latents=features.latents[:4].flip(3),
        captions=features.captions[:4],
        names=[f"other {name}" for name in features.names[:4]],
    )
    return [
        Job(features, QUICK, repeats=[2, 1, 1, 3, 1, 1]),
        Job(few, replace(QUICK, seed=6, rank=4, alpha=4.0, lr=3e-3, steps=6, schedule="cosine",
            warmup=2, clip=0.02, weight_decay=0.3)),
        Job(features, replace(QUICK, seed=7, rank=1, alpha=2.0, clip=0.0, steps=2, drop_caption=0.4)),
    ]  # fmt: skip


def with_settings(jobs, **changes):
    return [replace(job, settings=replace(job.settings, **changes)) for job in jobs]


def one_by_one(make, jobs):
    return [train(make(), j.features, Plain(), j.settings, repeats=j.repeats) for j in jobs]


def assert_alike(ours, truth, tolerance):
    """The difference of each factor, to `tolerance` of its norm."""
    assert list(ours.modules) == list(truth.modules)
    for name, module in truth.modules.items():
        found = ours.modules[name]
        assert (found.alpha, found.rank, found.kind) == (module.alpha, module.rank, module.kind)
        for role, tensor in module.tensors.items():
            assert found.tensors[role].shape == tensor.shape
            difference = (found.tensors[role] - tensor).norm() / tensor.norm()
            assert difference <= tolerance, (name, role, float(difference))


def same(a, b):
    return all(
        torch.equal(tensor, b.modules[name].tensors[role])
        for name, module in a.modules.items()
        for role, tensor in module.tensors.items()
    )


def state(denoiser):
    return {k: v.clone() for k, v in denoiser.unet.state_dict().items()}


@pytest.fixture
def in_double(tiny_pipeline):
    """A tiny denoiser in float64: AdamW divides by the gradient's size, so where that is close to zero
    float32 differs by more than 1e-5 from itself in another order of the sums."""
    from diffward.models.denoiser import Denoiser

    class Double(Denoiser):
        def predict(self, noisy, t, conditioning):
            return self.unet(noisy, t, conditioning).sample

        def inject(self, *args, **options):
            adapter = super().inject(*args, **options)
            for parameter in adapter.parameters():
                parameter.data = parameter.data.double()
            return adapter

    def make(prediction="epsilon"):
        denoiser = Double(tiny_pipeline(prediction), "tiny")
        denoiser.unet.double()
        return denoiser

    return make


def doubled(jobs):
    return [
        replace(
            job,
            features=replace(
                job.features,
                latents=job.features.latents.double(),
                _embeddings=job.features._embeddings.double(),
            ),
        )
        for job in jobs
    ]


@pytest.mark.parametrize(
    "targets, prediction",
    [
        ("attention", "epsilon"),
        ("attention", "v_prediction"),
        ("all", "epsilon"),
        ("time_emb_proj,to_q", "epsilon"),
    ],
)
def test_is_training_one_by_one(in_double, jobs, targets, prediction):
    jobs = doubled(with_settings(jobs, targets=targets))
    outcome = train_many(in_double(prediction), jobs)
    truth = one_by_one(lambda: in_double(prediction), jobs)
    assert [result.steps for result in outcome] == [4, 6, 2]
    for ours, alone in zip(outcome, truth, strict=True):
        assert (ours.steps, ours.exposure) == (alone.steps, alone.exposure)
        assert ours.losses == pytest.approx(alone.losses, rel=1e-10)
        assert_alike(ours.weights, alone.weights, 1e-9)


def test_in_single_precision(tiny_denoiser, jobs):
    jobs = with_settings(jobs, targets="all")
    outcome = train_many(tiny_denoiser(), jobs)
    for ours, alone in zip(outcome, one_by_one(tiny_denoiser, jobs), strict=True):
        assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
        assert_alike(ours.weights, alone.weights, 1e-3)


@pytest.mark.parametrize("onednn", [True, False])
def test_the_gradients_are_those_of_peft(tiny_denoiser, monkeypatch, onednn):
    """Both factors drawn, so that both have a gradient."""
    import diffward.models.stacked as stacked

    if not onednn:
        monkeypatch.setattr(stacked, "_ONEDNN", None)
    names = Settings(targets="all").target_modules()
    denoiser, generator = tiny_denoiser(), torch.Generator().manual_seed(0)
    latents, eps = torch.randn((2, 6, *denoiser.latent_shape), generator=generator)
    text = torch.randn((6, 12, 16), generator=generator)
    t = torch.tensor([1, 100, 200, 300, 400, 900])
    weights, truth = [], []
    for k in range(3):
        adapter = denoiser.inject(k + 1, 2.0, names, text_encoder=False, init=False)
        weights.append(adapter.weights())
        own = slice(2 * k, 2 * k + 2)
        errors = denoiser.errors(latents[own], t[own], eps[own], text[own])
        truth.append([errors.detach(), *torch.autograd.grad(errors.mean(), adapter.parameters())])
    adapter = stack(denoiser, weights)
    errors = denoiser.errors(latents, t, eps, text)
    (3 * errors.mean()).backward()
    for k, (error, *gradients) in enumerate(truth):
        torch.testing.assert_close(errors[2 * k : 2 * k + 2], error, rtol=1e-4, atol=1e-5)
        for p, g in zip(adapter.parameters(), gradients, strict=True):
            ours, rest = p.grad[k, : k + 1], p.grad[k, k + 1 :]
            theirs = g.flatten(1) if len(g) == k + 1 else g.flatten(1).t()
            assert (ours - theirs).abs().max() <= 1e-4 * g.abs().max()
            assert bool(g.any()) and not rest.any()
    # One of the three alone, the others resting.
    adapter.active = 1
    torch.testing.assert_close(
        denoiser.errors(latents[:2], t[:2], eps[:2], text[:2]), truth[0][0], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="3 rows cannot be shared by 2"):
        adapter.active = 2
        denoiser.errors(latents[:3], t[:3], eps[:3], text[:3])


def test_the_padding_stays_zero(denoiser, jobs):
    seen = []

    def look(step, adapter):
        assert adapter.labels == [1, 0, 2]  # the longest first
        for layer in adapter.layers.values():
            assert layer.ranks == [4, 2, 1]
            for k, rank in enumerate(layer.ranks):
                assert not layer.down[k, rank:].any() and not layer.up[k, rank:].any()
                assert layer.down[k, :rank].any() and bool(layer.up[k, :rank].any()) == (step > 0)
        seen.append(step)

    train_many(denoiser, with_settings(jobs, targets="all"), on_step=look)
    assert seen == list(range(7))


def test_who_is_done_does_not_move(denoiser, jobs):
    after = {}
    outcome = train_many(
        denoiser, jobs, on_step=lambda step, adapter: after.update({step: adapter.weights(2)})
    )
    assert not same(after[1], after[2])
    assert same(after[2], after[6]) and same(after[6], outcome[2].weights)
    assert [len(result.losses) for result in outcome] == [4, 6, 2]


@pytest.mark.parametrize("at_once", [3, 2])
def test_resumed_is_uninterrupted(denoiser, jobs, tmp_path, at_once):
    file = tmp_path / "state.pt"
    straight = train_many(denoiser, jobs, at_once=at_once)
    for stop in (stop_at(0), stop_at(1), stop_at(3), stop_at(5)):
        with pytest.raises(KeyboardInterrupt):
            train_many(denoiser, jobs, checkpoint=file, at_once=at_once, on_step=stop)
    with pytest.raises(KeyboardInterrupt):  # within step 5
        train_many(denoiser, jobs, method=StopAfter(0), checkpoint=file, at_once=at_once)
    torch.rand(7)  # the global generator has no say
    for method in (Plain(), StopAfter(0)):  # then once more: nothing is left to do
        again = train_many(denoiser, jobs, method=method, checkpoint=file, at_once=at_once)
        for one, other in zip(straight, again, strict=True):
            assert one.losses == other.losses and same(one.weights, other.weights)
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == (["state.pt"] if at_once == 3 else ["state-0.pt", "state-1.pt"])


def test_killed_in_the_optimizer(denoiser, jobs, tmp_path, monkeypatch):
    """Half a step is never saved; what is left is the last checkpoint."""
    file, whole = tmp_path / "state.pt", StackedAdamW.step
    jobs = with_settings(jobs, checkpoint_every=2)
    straight = train_many(denoiser, jobs)

    def half(self):
        whole(self)
        if self.param_groups[0]["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StackedAdamW, "step", half)
        with pytest.raises(KeyboardInterrupt):
            train_many(denoiser, jobs, checkpoint=file)
    assert torch.load(file)["step"] == 2
    for one, other in zip(straight, train_many(denoiser, jobs, checkpoint=file), strict=True):
        assert one.losses == other.losses and same(one.weights, other.weights)


def test_other_jobs_are_refused(denoiser, jobs, tmp_path):
    file = tmp_path / "state.pt"
    train_many(denoiser, jobs, checkpoint=file)
    other = replace(jobs[1], settings=replace(jobs[1].settings, lr=0.5))
    for word, changed in (("lr", [jobs[0], other, jobs[2]]), ("jobs", jobs[:2])):
        with pytest.raises(InputError, match=f"of a run with another .*{word}"):
            train_many(denoiser, changed, checkpoint=file)


def test_groups_give_the_same(in_double, jobs):
    jobs = doubled(jobs)
    together, apart = train_many(in_double(), jobs), train_many(in_double(), jobs, at_once=1)
    for one, other in zip(together, apart, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-10)
        assert_alike(one.weights, other.weights, 1e-9)
    assert train_many(in_double(), []) == []


def test_how_many_at_once(denoiser):
    assert (group_size(denoiser, 8), group_size(denoiser, 4), group_size(denoiser, 500)) == (
        16,
        32,
        1,
    )
    denoiser.latent_shape = (4, 64, 64)
    assert (group_size(denoiser, 8), group_size(denoiser, 2), group_size(denoiser, 32)) == (1, 4, 1)


def test_the_base_stays_as_it_was(denoiser, jobs):
    before, generator = state(denoiser), torch.get_rng_state()
    forwards = {name: module.forward for name, module in denoiser.unet.named_modules()}
    train_many(denoiser, with_settings(jobs, targets="all"))
    after = state(denoiser)
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert forwards == {name: module.forward for name, module in denoiser.unet.named_modules()}
    assert torch.equal(torch.get_rng_state(), generator)
    assert denoiser.trainable_adapter is None
    with pytest.raises(RuntimeError, match="no adapter"), denoiser.adapter(True):
        pass


def test_off_is_the_base(denoiser, jobs):
    """Bit for bit, and with what is loaded it is what `attach` gives."""
    weights = [
        result.weights for result in train_many(denoiser, with_settings(jobs, targets="all"))
    ]
    generator = torch.Generator().manual_seed(0)
    latents, eps = torch.randn((2, 6, *denoiser.latent_shape), generator=generator)
    inputs = latents, torch.arange(6) * 150, eps, torch.randn((6, 12, 16), generator=generator)
    with torch.no_grad():
        base, merged = denoiser.errors(*inputs), []
        for k, one in enumerate(weights):
            denoiser.attach(one)
            merged.append(denoiser.errors(*(part[2 * k : 2 * k + 2] for part in inputs)))
        adapter = stack(denoiser, weights)
        torch.testing.assert_close(
            denoiser.errors(*inputs), torch.cat(merged), rtol=1e-4, atol=1e-5
        )
        with denoiser.adapter(False):
            assert torch.equal(denoiser.errors(*inputs), base)
    assert all(same(adapter.weights(k), one) for k, one in enumerate(weights))
    assert not denoiser.adapts_text
    # The other way round: a LoRA of a smaller rank into the place of a wider one.
    adapter.load(1, weights[2])
    assert same(adapter.weights(1), weights[2])
    with pytest.raises(InputError, match="does not fit a stack of rank 2"):
        stack(denoiser, [weights[0], weights[2]]).load(0, weights[1])


def test_what_cannot_be_stacked(denoiser, jobs):
    weights = train_many(denoiser, with_settings(jobs[:1], steps=1))[0].weights
    fewer = replace(weights, modules=dict(list(weights.modules.items())[:-1]))
    with pytest.raises(InputError, match="must adapt the same modules"):
        stack(denoiser, [weights, fewer])
    renamed = {"unet.nowhere.to_q": next(iter(weights.modules.values()))}
    with pytest.raises(InputError, match="no linear layer or convolution unet"):
        stack(denoiser, [replace(weights, modules=renamed)])
    name, module = next(iter(weights.modules.items()))
    dora = replace(module, tensors={**module.tensors, "magnitude": torch.ones(8)})
    with pytest.raises(InputError, match="only plain LoRAs"):
        stack(denoiser, [replace(weights, modules={name: dora})])
    with pytest.raises(InputError, match="no LoRA"):
        stack(denoiser, [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tune": "full"}, "job 1: --tune full: must be lora to train many at once"),
        ({"accumulate": 2}, "job 1: --accumulate 2: must be 1"),
        ({"text_encoder": True}, "job 1: --text-encoder True: must be False"),
        ({"track": "tensorboard"}, "job 1: --track tensorboard: must be none"),
        ({"batch": 3}, "job 1: --batch 3: must be 2 as in job 0"),
        ({"targets": "to_q,to_k"}, "job 1: --targets to_q,to_k: must be to_q,to_k,to_v,to_out.0"),
    ],
)
def test_jobs_that_do_not_go_together(denoiser, jobs, change, message):
    jobs = [jobs[0], *with_settings(jobs[1:2], **change)]
    with pytest.raises(InputError, match=f"^{message}"):
        train_many(denoiser, jobs)


def test_at_once_and_empty_jobs_are_checked(denoiser, jobs):
    with pytest.raises(InputError, match="at_once 0: must be at least 1"):
        train_many(denoiser, jobs, at_once=0)
    with pytest.raises(InputError, match="job 1: there is no picture to train on"):
        train_many(denoiser, [jobs[0], replace(jobs[0], repeats=[0] * 6)])


def test_a_picture_with_nan_is_named(denoiser, jobs, tmp_path):
    latents = jobs[1].features.latents.clone()
    latents[3, 0, 0, 0] = torch.nan
    jobs[1] = replace(jobs[1], features=replace(jobs[1].features, latents=latents))
    file = tmp_path / "state.pt"
    with pytest.raises(TrainingError, match=r"^job 1, step \d: .* not finite for other 3\.png;"):
        train_many(denoiser, jobs, checkpoint=file)
    assert not file.exists() and denoiser.trainable_adapter is None
    assert not any("forward" in vars(module) for module in denoiser.unet.modules())


def test_one_that_does_not_move_is_an_error(denoiser, jobs):
    jobs[2] = replace(jobs[2], settings=replace(jobs[2].settings, lr=1e-50))
    with pytest.raises(TrainingError, match=r"^job 2, step 0: lora_B did not move"):
        train_many(denoiser, jobs)


def test_a_method_sees_the_batch_of_all(tiny_denoiser, jobs):
    """Its losses are per sample; the rows are those of each job's own pictures."""
    batches = []

    class Weighted(Plain):
        def loss(self, denoiser, batch):
            batches.append(batch)
            with denoiser.adapter(False), torch.no_grad():
                reference = super().loss(denoiser, batch)
            return super().loss(denoiser, batch) * batch.t / 1000 + reference

    jobs = with_settings(jobs, targets="all")
    outcome = train_many(tiny_denoiser(), jobs, method=Weighted())
    assert [len(batch.rows) for batch in batches] == [6, 6, 4, 4, 2, 2]
    assert all(batch.rows[:2].max() < 4 for batch in batches)
    for job, ours in zip(jobs, outcome, strict=True):
        alone = train(tiny_denoiser(), job.features, Weighted(), job.settings, repeats=job.repeats)
        assert ours.losses == pytest.approx(alone.losses, rel=1e-5)
        assert_alike(ours.weights, alone.weights, 1e-3)


def test_gradient_checkpointing_gives_the_same(denoiser, jobs):
    plain = train_many(denoiser, jobs)
    saving = train_many(
        denoiser, [*jobs[:2], *with_settings(jobs[2:], gradient_checkpointing=True)]
    )
    assert not denoiser.unet.is_gradient_checkpointing
    for one, other in zip(plain, saving, strict=True):
        assert_alike(one.weights, other.weights, 1e-4)


def test_half_precision(tiny_denoiser, jobs):
    make = lambda: tiny_denoiser(dtype=torch.bfloat16)  # noqa: E731
    jobs = with_settings(jobs, targets="to_q,conv1", steps=2)
    for ours, alone in zip(train_many(make(), jobs), one_by_one(make, jobs), strict=True):
        assert ours.losses == pytest.approx(alone.losses, rel=0.02)
        for module in ours.weights.modules.values():
            assert all(
                t.dtype == torch.float32 and t.isfinite().all() for t in module.tensors.values()
            )


# --- the optimizer ---------------------------------------------------------------------------------


def test_the_optimizer_is_adamw_bit_for_bit():
    torch.manual_seed(0)
    lrs, decays, limits = [1e-2, 3e-4, 0.5], [0.0, 0.01, 0.3], [0.0, 0.5, 100.0]
    start = [torch.randn(3, 4, 5), torch.randn(3, 4, 7)]
    stacked = [nn.Parameter(p.clone()) for p in start]
    ours = StackedAdamW(stacked, lrs, decays)
    alone = [[nn.Parameter(p[k].clone()) for p in start] for k in range(3)]
    theirs = [
        torch.optim.AdamW(ps, lr=lr, weight_decay=decay, foreach=True)
        for ps, lr, decay in zip(alone, lrs, decays, strict=True)
    ]
    for step in range(6):
        moving = 3 if step < 4 else 1  # two come to their end
        gradients = [torch.randn_like(p) * 0.1 for p in start]
        for p, g in zip(stacked, gradients, strict=True):
            p.grad = g.clone()
        clip_each(stacked, limits[:moving])
        ours.param_groups[0]["lr"] = [lr * (step + 1) for lr in lrs[:moving]]
        ours.step()
        for k in range(moving):
            for p, g in zip(alone[k], gradients, strict=True):
                p.grad = g[k].clone()
            if limits[k]:
                torch.nn.utils.clip_grad_norm_(alone[k], limits[k])
            theirs[k].param_groups[0]["lr"] = lrs[k] * (step + 1)
            theirs[k].step()
        if step == 2:  # saved and taken up again
            buffer = io.BytesIO()
            torch.save(ours.state_dict(), buffer)
            buffer.seek(0)
            ours = StackedAdamW(stacked, [1.0] * 3, [1.0] * 3)
            ours.load_state_dict(torch.load(buffer, weights_only=True))
        for k in range(3):
            for p, q in zip(stacked, alone[k], strict=True):
                torch.testing.assert_close(p[k], q, rtol=1e-6, atol=1e-7)
                if not limits[k]:  # the norm is summed in another order
                    assert torch.equal(p[k], q)
