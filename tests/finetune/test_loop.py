"""The truth is a straightforward loop on the same batches, and the run that was never stopped."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from diffward.errors import InputError, TrainingError
from diffward.finetune import Settings, train
from diffward.finetune.sampler import Sampler
from tests.finetune.stops import Plain, StopAfter, stop_at

QUICK = Settings(steps=6, batch=2, rank=2, alpha=3.0, lr=1e-2, seed=5)


class Recorder(Plain):
    """Plain, and keeps the batches it was given."""

    def __init__(self):
        self.batches = []

    def loss(self, denoiser, batch):
        self.batches.append(replace(batch, conditioning=batch.conditioning.detach().clone()))
        return super().loss(denoiser, batch)


def result(denoiser):
    """All trained numbers: of the LoRA if there is one, else of the whole base."""
    if denoiser.trainable_adapter:
        return [p.detach().clone() for p in denoiser.trainable_adapter.parameters()]
    return [p.detach().clone() for c in denoiser.components().values() for p in c.parameters()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def error_of(denoiser, features):
    """Mean error on fixed (t, eps), none of them drawn by the loop."""
    generator = torch.Generator().manual_seed(99)
    rows = torch.arange(len(features)).repeat(8)
    t = torch.randint(1000, (len(rows),), generator=generator)
    eps = torch.randn((len(rows), *denoiser.latent_shape), generator=generator)
    with torch.no_grad():
        return float(
            denoiser.errors(features.latents[rows], t, eps, features.conditioning(rows)).mean()
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_error_falls(tiny_denoiser, features, tune, prediction):
    denoiser = tiny_denoiser(prediction)
    before = error_of(denoiser, features)
    settings = Settings(steps=30, batch=6, lr=2e-2, tune=tune, targets="all", schedule="cosine")
    outcome = train(denoiser, features, Plain(), settings)
    assert error_of(denoiser, features) < 0.9 * before
    assert outcome.steps == len(outcome.losses) == 30
    assert outcome.exposure == 30  # 30 steps of 6 over 6 pictures
    assert (outcome.weights is None) == (tune == "full")
    if tune == "lora":
        with denoiser.adapter(False):
            assert error_of(denoiser, features) == before


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_is_a_straightforward_loop(tiny_denoiser, tiny_pipeline, features, prediction):
    """diffusers' scheduler, its `add_adapter`, torch's AdamW, one sample at a time."""
    from peft import LoraConfig

    settings = replace(
        QUICK, steps=4, accumulate=2, clip=0.05, schedule="cosine", warmup=2, weight_decay=0.1
    )
    method, denoiser, start = Recorder(), tiny_denoiser(prediction), {}
    outcome = train(
        denoiser, features, method, settings,
        on_step=lambda n: start.update(denoiser.trainable_adapter.weights().modules) if n == 0 else None,
    )  # fmt: skip
    assert len(method.batches) == 8

    pipe = tiny_pipeline(prediction)
    unet = pipe.unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=3.0, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    named = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in named.items():
            path, factor = name.split(".lora_")
            p.copy_(start[f"unet.{path}"].tensors["down" if factor[0] == "A" else "up"])
    optimizer = torch.optim.AdamW(named.values(), lr=1.0, weight_decay=0.1, foreach=False)
    losses = []
    for step, rate in enumerate([0.005, 0.01, 0.01, 0.005]):
        total = 0.0
        for batch in method.batches[2 * step : 2 * step + 2]:
            for i in range(2):
                z, eps, t = batch.latents[i : i + 1], batch.eps[i : i + 1], batch.t[i : i + 1]
                noisy = pipe.scheduler.add_noise(z, eps, t)
                velocity = prediction == "v_prediction"
                truth = pipe.scheduler.get_velocity(z, eps, t) if velocity else eps
                said = unet(noisy, t, batch.conditioning[i : i + 1]).sample
                loss = torch.nn.functional.mse_loss(said, truth) / 4
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(named.values(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    torch.testing.assert_close(
        torch.tensor(outcome.losses), torch.tensor(losses), atol=1e-5, rtol=1e-4
    )
    for name, p in named.items():
        path, factor = name.split(".lora_")
        ours = outcome.weights.modules[f"unet.{path}"].tensors["down" if factor[0] == "A" else "up"]
        torch.testing.assert_close(ours, p.detach(), atol=1e-4, rtol=1e-3)


def test_the_gradient_is_the_mean_over_the_samples(
    tiny_denoiser, tiny_pipeline, features, monkeypatch
):
    """AdamW hides the gradient's size, so it is caught before the step."""
    method, denoiser, caught = Recorder(), tiny_denoiser(), []

    def step(self, closure=None):
        caught.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = Settings(steps=1, batch=2, accumulate=3, clip=0, tune="full")
    train(denoiser, features, method, settings)

    pipe = tiny_pipeline()
    parameters = list(pipe.unet.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for batch in method.batches:
        for i in range(2):
            z, eps, t = batch.latents[i : i + 1], batch.eps[i : i + 1], batch.t[i : i + 1]
            said = pipe.unet(pipe.scheduler.add_noise(z, eps, t), t, batch.conditioning[i : i + 1])
            loss = torch.nn.functional.mse_loss(said.sample, eps)
            for into, part in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                into += part / 6
    assert len(caught) == len(total) and any(bool(g.any()) for g in caught)
    for ours, truth in zip(caught, total, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-6, rtol=1e-4)


RUNS = {
    "lora": {},
    "lora on all": {"targets": "all", "accumulate": 2, "schedule": "cosine", "warmup": 2},
    "text encoder": {"text_encoder": True, "drop_caption": 0.4},
    "drop captions": {"drop_caption": 0.4},
    "full": {"tune": "full", "lr": 1e-3},
    "full with text encoder": {"tune": "full", "text_encoder": True, "lr": 1e-3, "accumulate": 2},
    "flip": {"flip": True},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted(tiny_denoiser, pictures, tmp_path, name):
    from diffward.models.features import encode_pictures

    settings = replace(QUICK, **RUNS[name])
    features = encode_pictures(tiny_denoiser(), pictures, flip=settings.flip)
    straight = tiny_denoiser()
    outcome = train(straight, features, Plain(), settings)

    file = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_denoiser(), features, Plain(), settings, checkpoint=file, on_step=stop_at(3))
    torch.rand(7)  # the global generator has no say
    resumed, seen = tiny_denoiser(), []
    again = train(resumed, features, Plain(), settings, checkpoint=file, on_step=seen.append)
    assert seen == [4, 5, 6]
    assert again.losses == outcome.losses
    assert equal(result(resumed), result(straight))
    # Once more: it is done, and nothing is trained.
    third = tiny_denoiser()
    assert train(third, features, StopAfter(0), settings, checkpoint=file).losses == outcome.losses
    assert equal(result(third), result(straight))


def test_interrupted_anywhere(tiny_denoiser, features, tmp_path, monkeypatch):
    """Before the first step, between passes of one step, and while the optimizer steps."""
    settings = replace(QUICK, accumulate=2, checkpoint_every=2)
    straight = tiny_denoiser()
    train(straight, features, Plain(), settings)
    file = tmp_path / "state.pt"
    for stop in (
        {"method": Plain(), "on_step": stop_at(0)},
        {"method": StopAfter(3)},
        {"method": StopAfter(3)},
    ):
        with pytest.raises(KeyboardInterrupt):
            train(tiny_denoiser(), features, settings=settings, checkpoint=file, **stop)
    assert torch.load(file)["step"] == 2
    step = torch.optim.AdamW.step

    def half(self, closure=None):
        step(self, closure)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_denoiser(), features, Plain(), settings, checkpoint=file)
    assert torch.load(file)["step"] == 2
    resumed = tiny_denoiser()
    train(resumed, features, Plain(), settings, checkpoint=file)
    assert equal(result(resumed), result(straight))
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["state.pt"]


def test_killed_without_warning(tiny_denoiser, features, tmp_path):
    """What is left is the last checkpoint; the run goes on from there."""

    def die(done):
        if done == 5:
            raise MemoryError

    settings, file = replace(QUICK, checkpoint_every=2), tmp_path / "state.pt"
    with pytest.raises(MemoryError):
        train(tiny_denoiser(), features, Plain(), settings, checkpoint=file, on_step=die)
    seen, resumed, straight = [], tiny_denoiser(), tiny_denoiser()
    train(resumed, features, Plain(), settings, checkpoint=file, on_step=seen.append)
    train(straight, features, Plain(), settings)
    assert seen == [5, 6] and equal(result(resumed), result(straight))


def test_another_run_is_refused(tiny_denoiser, tiny_pipeline, features, tmp_path):
    from diffward.models.denoiser import Denoiser

    file = tmp_path / "state.pt"
    train(tiny_denoiser(), features, Plain(), QUICK, checkpoint=file)
    other_data = replace(features, latents=features.latents + 1)
    pipe = tiny_pipeline()
    pipe.unet.conv_in.weight.data += 0.01
    for word, denoiser, data, settings, extra in (
        ("lr", tiny_denoiser(), features, replace(QUICK, lr=0.5), {}),
        ("rank", tiny_denoiser(), features, replace(QUICK, rank=3), {}),
        ("seed", tiny_denoiser(), features, replace(QUICK, seed=6), {}),
        ("steps, total", tiny_denoiser(), features, replace(QUICK, steps=7), {}),
        ("tune", tiny_denoiser(), features, replace(QUICK, tune="full"), {}),
        ("data", tiny_denoiser(), other_data, QUICK, {}),
        ("data", tiny_denoiser(), features, QUICK, {"repeats": [2, 1, 1, 1, 1, 1]}),
        ("base", tiny_denoiser(seed=1), features, QUICK, {}),
        ("base", Denoiser(pipe, "another UNet"), features, QUICK, {}),
        ("precision", tiny_denoiser(dtype=torch.bfloat16), features, QUICK, {}),
    ):
        with pytest.raises(InputError, match=f"of a run with another .*{word}"):
            train(denoiser, data, Plain(), settings, checkpoint=file, **extra)
    with pytest.raises(InputError, match="another method"):
        train(tiny_denoiser(), features, Recorder(), QUICK, checkpoint=file)
    # What does not change the weights may change.
    relaxed = replace(QUICK, checkpoint_every=3, sample_every=2, sample_prompts=["a cup"])
    train(tiny_denoiser(), features, StopAfter(0), relaxed, checkpoint=file)


def test_a_broken_checkpoint_is_refused(tiny_denoiser, features, tmp_path):
    file = tmp_path / "state.pt"
    train(tiny_denoiser(), features, Plain(), QUICK, checkpoint=file)
    whole = file.read_bytes()

    def refuse():
        with pytest.raises(InputError, match="cannot be read as a checkpoint") as caught:
            train(tiny_denoiser(), features, Plain(), QUICK, checkpoint=file)
        assert "\n" not in str(caught.value)

    for broken in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        refuse()
    for other in ([1, 2], {"a": torch.ones(2)}, {"run": "me", "parameters": []}):
        torch.save(other, file)
        refuse()
    state = torch.load(io.BytesIO(whole))
    for key in ("optimizer", "losses", "step"):
        torch.save({k: v for k, v in state.items() if k != key}, file)
        refuse()


def test_gradient_checkpointing_gives_the_same_weights(tiny_denoiser, features, monkeypatch):
    import torch.utils.checkpoint as checkpointing

    calls, original = [], checkpointing.checkpoint

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)
    for settings in (QUICK, replace(QUICK, tune="full", lr=1e-3)):
        plain, saving = tiny_denoiser(), tiny_denoiser()
        train(plain, features, Plain(), settings)
        assert not calls
        train(saving, features, Plain(), replace(settings, gradient_checkpointing=True))
        assert calls
        calls.clear()
        for a, b in zip(result(plain), result(saving), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        train(saving, features, Plain(), settings)
        assert not calls  # switched off again


def test_a_picture_with_nan_is_named(tiny_denoiser, features, tmp_path):
    method = Recorder()
    train(tiny_denoiser(), features, method, QUICK)
    step = next(i for i, batch in enumerate(method.batches) if 3 in batch.rows)
    latents = features.latents.clone()
    latents[3, 0, 0, 0] = torch.nan
    denoiser, file = tiny_denoiser(), tmp_path / "state.pt"
    with pytest.raises(TrainingError, match=rf"^step {step}: .* for 3\.png;"):
        train(denoiser, replace(features, latents=latents), Plain(), QUICK, checkpoint=file)
    assert not file.exists()


class OffTheAdapter(Plain):
    """A mistake: the loss does not depend on the adapter."""

    def loss(self, denoiser, batch):
        with denoiser.adapter(False):
            loss = super().loss(denoiser, batch)
        return loss + 0 * sum(p.sum() for p in denoiser.trainable_adapter.parameters())


@pytest.mark.parametrize(
    "method, settings", [(OffTheAdapter(), QUICK), (Plain(), replace(QUICK, lr=1e-50))]
)
def test_an_adapter_that_does_not_move_is_an_error(tiny_denoiser, features, method, settings):
    with pytest.raises(TrainingError, match="lora_B did not move"):
        train(tiny_denoiser(), features, method, settings)


def test_the_base_stays_as_it_was(tiny_denoiser, features):
    def copy(denoiser):
        modules = {**denoiser.components(), "vae": denoiser.vae}
        return {
            f"{k}.{n}": p.clone() for k, m in modules.items() for n, p in m.state_dict().items()
        }

    denoiser = tiny_denoiser()
    before, generator = copy(denoiser), torch.get_rng_state()
    train(denoiser, features, Plain(), replace(QUICK, targets="all", text_encoder=True))
    assert torch.equal(torch.get_rng_state(), generator)
    denoiser.detach()
    after = copy(denoiser)
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_full_fine_tuning_moves_what_it_should(tiny_denoiser, features):
    base = tiny_denoiser()
    for text_encoder in (False, True):
        denoiser = tiny_denoiser()
        train(
            denoiser,
            features,
            Plain(),
            replace(QUICK, tune="full", text_encoder=text_encoder, steps=2),
        )
        moved = {
            part: any(
                not torch.equal(a, b)
                for a, b in zip(
                    getattr(denoiser, part).parameters(),
                    getattr(base, part).parameters(),
                    strict=True,
                )
            )
            for part in ("unet", "text_encoder", "vae")
        }
        assert moved == {"unet": True, "text_encoder": text_encoder, "vae": False}


def test_the_start_depends_on_the_seed_alone(tiny_denoiser, features):
    def start(seed):
        denoiser, found = tiny_denoiser(), []
        torch.rand(seed + 3)
        with pytest.raises(KeyboardInterrupt):
            train(
                denoiser, features, Plain(), replace(QUICK, seed=seed),
                on_step=lambda n: (found.extend(result(denoiser)), stop_at(0)(n)),
            )  # fmt: skip
        return found

    first, again, other = start(1), start(1), start(2)
    assert equal(first, again) and not equal(first, other)
    assert all(not b.any() for b in first[1::2]) and all(a.any() for a in first[0::2])


def test_half_precision(tiny_denoiser, features):
    denoiser = tiny_denoiser(dtype=torch.bfloat16)
    outcome = train(denoiser, features, Plain(), replace(QUICK, text_encoder=True, steps=2))
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in result(denoiser))
    assert all(0 < loss < 100 for loss in outcome.losses)


# --- the sampler -------------------------------------------------------------------------------


def drawn(denoiser, features, settings, order=None, steps=6):
    draw = Sampler(denoiser, features, settings, order or list(range(len(features))), 0, 1)
    return [draw(step, micro) for step in range(steps) for micro in range(settings.accumulate)]


def test_every_picture_once_an_epoch_in_fresh_order(denoiser, features):
    rows = torch.cat([b.rows for b in drawn(denoiser, features, QUICK)]).tolist()
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert rows[:6] != rows[6:]
    other = torch.cat([b.rows for b in drawn(denoiser, features, replace(QUICK, seed=6))]).tolist()
    assert other != rows


def test_repeats(tiny_denoiser, features):
    repeats, method = [3, 1, 2, 0, 1, 1], Recorder()
    settings = Settings(epochs=2, batch=4, rank=2)
    outcome = train(tiny_denoiser(), features, method, settings, repeats=repeats)
    assert outcome.steps == 4 and outcome.exposure == 2
    rows = torch.cat([b.rows for b in method.batches])
    assert torch.bincount(rows[:8], minlength=6).tolist() == repeats
    assert torch.bincount(rows[8:], minlength=6).tolist() == repeats
    with pytest.raises(ValueError):
        train(tiny_denoiser(), features, method, settings, repeats=[1, 2])


def test_accumulation_goes_through_the_same_pictures(denoiser, features):
    one = torch.cat([b.rows for b in drawn(denoiser, features, replace(QUICK, batch=4), steps=3)])
    two = torch.cat(
        [b.rows for b in drawn(denoiser, features, replace(QUICK, accumulate=2), steps=3)]
    )
    assert torch.equal(one, two)


def test_noise_and_timesteps(denoiser, features):
    batches = drawn(denoiser, features, replace(QUICK, batch=50, accumulate=2), steps=10)
    t = torch.cat([b.t for b in batches]).double()
    assert t.min() >= 0 and t.max() <= 999
    assert abs(float(t.mean()) - 499.5) < 4 * 289 / 1000**0.5
    eps = torch.cat([b.eps for b in batches])
    assert abs(float(eps.mean())) < 0.02 and abs(float(eps.std()) - 1) < 0.02
    assert len({tuple(e.flatten()[:3].tolist()) for e in eps}) == len(eps)  # none twice
    for batch in batches:
        assert torch.equal(batch.latents, features.latents[batch.rows])


@pytest.mark.parametrize("text_encoder", [False, True])
def test_captions_belong_to_the_pictures_and_some_are_dropped(denoiser, features, text_encoder):
    settings = replace(QUICK, batch=50, text_encoder=text_encoder, drop_caption=0.3)
    null, dropped, total = denoiser.condition([""])[0], 0, 0
    for batch in drawn(denoiser, features, settings):
        for row, text in zip(batch.rows.tolist(), batch.conditioning, strict=True):
            if features.captions[row]:
                total += 1
                own = denoiser.condition([features.captions[row]])[0]
                if torch.allclose(text, null, atol=1e-4):
                    dropped += 1
                else:
                    torch.testing.assert_close(text, own, atol=1e-4, rtol=1e-3)
    assert abs(dropped / total - 0.3) < 4 * (0.21 / total) ** 0.5


def test_a_gradient_that_lies_otherwise_is_put_right():
    """The fused AdamW goes through memory: with other strides it would move the wrong entries and say nothing."""
    from diffward.finetune.adamw import adamw

    start, slope = torch.randn(3, 4), torch.randn(3, 4)
    moved = []
    for other in (False, True):
        p = torch.nn.Parameter(start.clone())
        p.grad = slope.T.contiguous().T if other else slope.clone()
        assert (p.grad.stride() == p.stride()) != other
        adamw([p], 1e-2, 0.1).step()
        moved.append(p.detach())
    assert torch.equal(*moved) and not torch.equal(moved[0], start)
