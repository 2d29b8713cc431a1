"""The truth is one backward pass a picture, closed forms for the Gaussian mechanism, and opacus itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

pytest.importorskip("opacus")

from diffward.errors import InputError, TrainingError
from diffward.finetune import Settings, loop, train
from diffward.finetune.accounting import plan
from diffward.finetune.dp import DPSGD
from diffward.finetune.method import Batch, Run
from diffward.finetune.noisy import NoisyOptimizer
from diffward.finetune.per_sample import PerSample, convolution_gradients
from diffward.finetune.secret import Secret
from diffward.finetune.settings import DP, GaugeOptions
from tests.finetune.stops import stop_at

# Next to no noise: what is left is clipping and averaging. Where noise matters, the test says so.
QUIET = Settings(steps=4, batch=2, rank=2, alpha=3.0, lr=1e-2, seed=5, dp=DP(noise=1e-7, clip=0.05))


@pytest.fixture
def fixed_secret(monkeypatch):
    """The system's randomness is the same every time, so that statistics cannot fail by chance."""
    monkeypatch.setattr("os.urandom", lambda count: bytes(range(count)))


class Recorder(DPSGD):
    """Keeps what each pass drew, and the gradient and weights that the optimizer met in each step."""

    def __init__(self):
        self.drawn, self.grads, self.before = {}, [], []

    def prepare(self, optimizer):
        def look(*_):
            self.grads.append([p.grad.clone() for p in self.run.parameters])
            self.before.append([p.detach().clone() for p in self.run.parameters])

        optimizer.register_step_pre_hook(look)
        return super().prepare(optimizer)

    def loss(self, denoiser, batch):
        original = denoiser.errors

        def errors(latents, t, eps, conditioning):
            step = self.drawn.setdefault(self._place[0], [])
            step.extend(zip(batch.rows, latents, t, eps, strict=True))
            return original(latents, t, eps, conditioning)

        denoiser.errors = errors
        try:
            return super().loss(denoiser, batch)
        finally:
            del denoiser.errors


class Blind(Recorder):
    """Draws nobody: its gradient is the noise."""

    def rows(self, step, micro):
        return super().rows(step, micro)[:0]


def injected(denoiser, settings=QUIET, targets="all", text_encoder=False):
    """A LoRA whose B is not zero, and its factors."""
    adapter = denoiser.inject(
        settings.rank, settings.alpha, replace(settings, targets=targets).target_modules(),
        text_encoder=text_encoder,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return [f["default"] for x in adapter.layers().values() for f in (x.lora_A, x.lora_B)]


def begun(denoiser, features, settings, total=4):
    """A method that a run has started, without the loop."""
    parameters = [f.weight for f in injected(denoiser, settings, "attention")]
    method = DPSGD()
    method.start(
        Run(denoiser, features, settings, parameters, list(range(len(features))), total, None)
    )
    method.prepare(torch.optim.AdamW(parameters, lr=settings.lr))
    return method


def one_at_a_time(denoiser, parameters, samples, conditioning):
    """The gradients (per sample, per parameter) of single backward passes, by autograd alone."""
    truth = []
    for latents, t, eps, given in zip(*samples, conditioning, strict=True):
        loss = denoiser.errors(latents[None], t[None], eps[None], given[None]).mean()
        truth.append(torch.autograd.grad(loss, parameters, retain_graph=True))
    return truth


def batch_of(denoiser, features, rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(1000, (len(rows),), generator=generator)
    eps = torch.randn((len(rows), *denoiser.latent_shape), generator=generator)
    return features.latents[rows], t, eps


@pytest.mark.parametrize(
    ("targets", "text_encoder", "checkpointing"),
    [("attention", False, False), ("all", False, False), ("all", False, True), ("attention", True, False)],
)  # fmt: skip
def test_gradients_are_those_of_single_passes(
    denoiser, features, targets, text_encoder, checkpointing
):
    factors = injected(denoiser, targets=targets, text_encoder=text_encoder)
    parameters, rows = [f.weight for f in factors], torch.tensor([0, 3, 5])
    samples = batch_of(denoiser, features, rows)
    ids = denoiser.tokenize([features.captions[r] for r in rows])
    truth = one_at_a_time(denoiser, parameters, samples, denoiser.embed(ids))

    if checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    recorder, forwards = PerSample(factors), []
    for factor in factors:
        factor.register_forward_hook(lambda *_: forwards.append(1))
    denoiser.errors(*samples, denoiser.embed(ids)).mean(dim=(1, 2, 3)).sum().backward()
    assert (len(forwards) > len(factors)) == checkpointing  # some are made again
    for index, parameter in enumerate(parameters):
        assert parameter.grad is None
        expected = torch.stack([gradients[index] for gradients in truth])
        torch.testing.assert_close(parameter.grad_sample, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad_sample.flatten(1).norm(dim=1).min() > 0 for p in parameters)

    recorder.remove()
    denoiser.errors(*samples, denoiser.embed(ids)).mean().backward()
    assert all(p.grad is not None and not hasattr(p, "grad_sample") for p in parameters)


def test_gradients_under_autocast(tiny_denoiser, features):
    """bfloat16 rounds: the truth in float32 is as near as that of an ordinary pass in bfloat16."""
    rows = torch.tensor([1, 4])
    plain, narrow = tiny_denoiser(), tiny_denoiser(dtype=torch.bfloat16)
    exact = [f.weight for f in injected(plain)]
    truth = one_at_a_time(
        plain, exact, batch_of(plain, features, rows), features.conditioning(rows)
    )
    factors = injected(narrow)
    PerSample(factors)
    samples = batch_of(narrow, features, rows)
    errors = narrow.errors(*samples, features.conditioning(rows))
    errors.mean(dim=(1, 2, 3)).sum().backward()
    got = [torch.cat([f.weight.grad_sample[i].flatten() for f in factors]) for i in range(2)]
    for gradient, single in zip(got, truth, strict=True):
        want = torch.cat([g.flatten() for g in single])
        assert gradient.dtype == torch.float32
        assert (gradient - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 2), (2, 1), (1, 0), (1, 2)), ((1, 1), (2, 2), (0, 0), (1, 1)),
        ((3, 3), (3, 2), (0, 2), (2, 1)),
    ],
)  # fmt: skip
def test_any_convolution(kernel, stride, padding, dilation):
    layer = nn.Conv2d(5, 3, kernel, stride, padding, dilation, bias=False).double()
    x = torch.randn(4, 5, 9, 8, dtype=torch.float64)
    y = layer(x)
    grad = torch.randn_like(y)
    truth = [
        torch.autograd.grad(y[i], layer.weight, grad[i], retain_graph=True)[0] for i in range(4)
    ]
    torch.testing.assert_close(convolution_gradients(layer, x, grad), torch.stack(truth))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_clips_each_picture_and_divides_by_the_expected_number(
    tiny_denoiser, features, accumulate, monkeypatch
):
    """The whole loop, against single passes on what it drew, clipped and summed by hand."""
    # A clipping of the loop's own would show; asked for, it is refused.
    monkeypatch.setattr(loop, "check_options", lambda method, settings: None)
    settings = replace(QUIET, accumulate=accumulate, targets="all", clip=1e-9)
    method = Recorder()
    train(tiny_denoiser(), features, method, settings)
    reference = tiny_denoiser()
    parameters = injected(reference, settings, "all")
    clipped = 0
    for step, (grads, before) in enumerate(zip(method.grads, method.before, strict=True)):
        for factor, value in zip(parameters, before, strict=True):
            factor.weight.data.copy_(value)
        drawn = method.drawn.get(step, [])
        sums = [torch.zeros_like(value) for value in before]
        for row, latents, t, eps in drawn:
            assert torch.equal(latents, features.latents[row])
            single = [(latents[None], t[None], eps[None]), features.conditioning(row[None])]
            (gradient,) = one_at_a_time(reference, [f.weight for f in parameters], *single)
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            clipped += bool(norm > settings.dp.clip)
            for total, g in zip(sums, gradient, strict=True):
                total += g * min(1.0, settings.dp.clip / float(norm))
        for got, total in zip(grads, sums, strict=True):
            torch.testing.assert_close(got, total / (2 * accumulate), rtol=1e-3, atol=1e-6)
    drawn = sum(map(len, method.drawn.values()))
    assert len(method.grads) == settings.steps and 0 < clipped <= drawn


def test_is_opacus(tiny_denoiser, features):
    """Its own hooks on the factors and its own optimizer make the same gradient, when there is no noise."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    rows, clip, grads = torch.tensor([0, 1, 2, 4]), 0.6, []
    for ours in (True, False):
        denoiser = tiny_denoiser()
        factors = injected(denoiser, targets="all")
        inner = torch.optim.AdamW([f.weight for f in factors], lr=1e-3)
        if ours:
            PerSample(factors)
            optimizer = NoisyOptimizer(
                inner,
                lambda count, device: torch.zeros(count),
                multiplier=1.0,
                clip=clip,
                expected=3,
            )
            optimizer.pictures = len(rows)
        else:
            GradSampleModule(nn.ModuleList(factors).train(), loss_reduction="sum")
            optimizer = DPOptimizer(
                inner, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=3
            )
        samples = batch_of(denoiser, features, rows)
        errors = denoiser.errors(*samples, features.conditioning(rows))
        errors.mean(dim=(1, 2, 3)).sum().backward()
        norms = torch.cat([g.flatten(1) for g in optimizer.grad_samples], dim=1).norm(dim=1)
        assert norms.min() < clip < norms.max(), norms
        optimizer.pre_step()
        grads.append([f.weight.grad for f in factors])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_large_draw_in_parts_is_the_same_step(tiny_denoiser, features):
    grads = []
    for parts in (False, True):
        method = begun(
            tiny_denoiser(), features, replace(QUIET, batch=6, dp=replace(QUIET.dp, clip=0.03))
        )
        if parts:
            method.run.settings = replace(method.run.settings, batch=4)
            assert method.passes(0) == 2
        assert len(method._draw(0)) == 6  # a chance of one
        denoiser, number = method.run.denoiser, 2 if parts else 1
        samples = batch_of(denoiser, features, torch.arange(6))
        for part in range(number):
            rows = method.rows(0, part)
            assert rows.tolist() == list(range(6))[part * 3 : part * 3 + 3 if parts else 6]
            method.secret = _same_draws(samples, rows)
            batch = Batch(samples[0][rows], features.conditioning(rows), *(s[rows] for s in samples[1:]), rows)  # fmt: skip
            (method.loss(denoiser, batch).mean() / 17).backward()  # whatever the loop divides by
        method._optimizer.pre_step()
        grads.append([p.grad for p in method.run.parameters])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def _same_draws(samples, rows):
    """In place of the secret t and eps of a pass those of `samples`, so that parts can be compared."""

    class Given(Secret):
        def stream(self, use, *place):
            return self if use == "loss" else super().stream(use, *place)

        def integers(self, levels, size):
            return samples[1][rows].numpy()

        def standard_normal(self, shape, dtype):
            return samples[2][rows].numpy()

    return Given()


def test_noise_has_the_scale_that_is_counted(denoiser, features, fixed_secret):
    settings = replace(
        QUIET, steps=5, rank=8, accumulate=2, targets="all", dp=DP(noise=0.7, clip=0.3)
    )
    method = Blind()
    outcome = train(denoiser, features, method, settings)
    steps = [torch.cat([g.flatten() for g in grads]).double() for grads in method.grads]
    assert len(steps) == outcome.steps == 5 and not method.drawn
    count = steps[0].numel()
    assert count > 5000
    expected = 0.7 * 0.3 / 4
    for step in steps:
        assert abs(float(step.std()) / expected - 1) < 4 / (2 * count) ** 0.5
        assert stats.kstest(step.numpy() / expected, "norm").pvalue > 1e-3
    # Steps and coordinates have nothing to do with each other.
    correlations = np.corrcoef(torch.stack(steps).numpy()) - np.eye(5)
    assert np.abs(correlations).max() < 4 / count**0.5
    assert abs(float((steps[0][1:] * steps[0][:-1]).mean())) < 4 * expected**2 / count**0.5


def test_draws_are_poisson(denoiser, features, fixed_secret):
    method = begun(denoiser, features, replace(QUIET, batch=2))
    draws = [method._draw(step) for step in range(3000)]
    counts = torch.bincount(torch.cat(draws), minlength=6)
    assert all(abs(int(c) - 1000) < 4 * (3000 * 1 / 3 * 2 / 3) ** 0.5 for c in counts)
    sizes = np.bincount([len(d) for d in draws], minlength=7)
    binomial = stats.binom.pmf(range(7), 6, 1 / 3) * 3000
    assert sizes[0] > 0  # draws may be empty
    assert stats.chisquare(sizes[:6], binomial[:6] * sizes[:6].sum() / binomial[:6].sum()).pvalue > 1e-3  # fmt: skip
    # t and eps differ from place to place, and are not the loop's.
    seen = [
        method.secret.stream("loss", step, 0).integers(1000, size=2).tolist() for step in range(50)
    ]
    assert len({tuple(pair) for pair in seen}) > 45


def weights(denoiser):
    return [p.detach().clone() for p in denoiser.trainable_adapter.parameters()]


def test_nobody_can_repeat_a_run_but_a_checkpoint_goes_on(
    tiny_denoiser, features, tmp_path, monkeypatch
):
    settings = replace(QUIET, steps=6, dp=DP(noise=0.5), checkpoint_every=2)
    monkeypatch.setattr("os.urandom", lambda count: b"a" * count)
    whole, again, other, stopped = (tiny_denoiser() for _ in range(4))
    train(whole, features, DPSGD(), settings)
    train(again, features, DPSGD(), settings)
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(stopped, features, DPSGD(), settings, checkpoint=file, on_step=stop_at(3))
    monkeypatch.setattr("os.urandom", lambda count: b"b" * count)
    train(other, features, DPSGD(), settings)
    resumed = DPSGD()
    outcome = train(stopped, features, resumed, settings, checkpoint=file)
    assert all(map(torch.equal, weights(whole), weights(again)))
    assert all(map(torch.equal, weights(whole), weights(stopped)))
    assert not any(map(torch.equal, weights(whole), weights(other)))
    assert outcome.steps == resumed.steps == 6
    assert Secret.of(torch.load(file)["parts"]["method"]["secret"]).value == b"a" * 32
    assert "a" * 32 not in f"{resumed.facts()}{resumed.secret}"


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_is_that_of_the_gaussian_mechanism(accountant):
    """All pictures in each step: T releases are one Gaussian of sensitivity sqrt(T) / noise, whose delta
    is known in closed form (Balle and Wang 2018, theorem 8)."""
    noise, steps = 8.0, 20
    ledger = plan(DP(noise=noise, delta=1e-3, accountant=accountant), 50, 50, steps)
    mu = steps**0.5 / noise

    def delta(epsilon):
        cdf = stats.norm.cdf
        return cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)

    exact = optimize.brentq(lambda epsilon: delta(epsilon) - 1e-3, 0, 20)
    assert exact <= ledger.epsilon(steps) <= exact * 1.2 + 0.01
    if accountant == "prv":
        assert ledger.epsilon(steps) <= exact + 0.03


@pytest.mark.parametrize("kind", ["prv", "rdp"])
def test_epsilon_is_opacus(kind):
    """Its accountant, told of each step in turn as its engine does."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    ledger = plan(DP(noise=1.1, delta=1e-5, accountant=kind), 8, 100, 200)
    accountant = {"prv": PRVAccountant, "rdp": RDPAccountant}[kind]()
    for _ in range(200):
        accountant.step(noise_multiplier=1.1, sample_rate=0.08)
    assert ledger.epsilon(200) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-3)
    renyi = RDPAccountant()
    renyi.history = accountant.history
    assert ledger.bound(200) == pytest.approx(renyi.get_epsilon(1e-5))
    assert 0 == ledger.epsilon(0) < ledger.epsilon(1) < ledger.epsilon(100) < ledger.epsilon(200)


def test_noise_is_as_much_as_a_target_takes():
    from opacus.accountants import PRVAccountant

    ledger = plan(DP(epsilon=3.0), 8, 100, 300)
    accountant = PRVAccountant()
    accountant.history = [(ledger.noise, 0.08, 300)]
    assert 2.95 <= accountant.get_epsilon(ledger.delta) <= 3.0
    assert ledger.delta == 1e-3  # 1 / (10 n)
    assert plan(DP(noise=1.0), 8, 433, 10).delta == 1e-4  # not 1 / 4330: the header tells it


def test_an_epsilon_that_cannot_be_had():
    with pytest.raises(InputError, match=r"2000 steps with 8 of 100 pictures.* at best") as caught:
        plan(DP(epsilon=0.05), 8, 100, 2000)
    words = str(caught.value).split()
    best, steps = float(words[words.index("reach") + 1]), int(words[words.index("--steps") + 1])
    most = plan(DP(noise=80.0), 8, 100, 2000)
    assert most.epsilon(2000) == pytest.approx(best, rel=0.1)
    assert plan(DP(epsilon=0.05), 8, 100, steps).epsilon(steps) <= 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DP(), "one of --dp.epsilon and --dp.noise"),
        (DP(epsilon=1, noise=1), "only one of --dp.epsilon and --dp.noise"),
        (DP(noise=1, delta=0.2), "--dp.delta 0.2"),
    ],
)
def test_targets_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        plan(options, 2, 6, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune": "full"}, "--tune full"),
        ({"drop_caption": 0.1}, "--drop-caption"),
        ({"flip": True}, "--flip"),
        ({"gauge": GaugeOptions(stop_auc=0.6)}, "--gauge.stop-auc"),
        ({"batch": 7}, "draws 7 pictures a step, but there are 6"),
    ],
)
def test_settings_that_would_break_the_bound(denoiser, features, change, message):
    with pytest.raises(InputError, match=message):
        train(denoiser, features, DPSGD(), replace(QUIET, **change))


def test_records_that_count_twice(denoiser, features):
    with pytest.raises(InputError, match="each picture once"):
        train(denoiser, features, DPSGD(), QUIET, repeats=[1, 1, 2, 1, 1, 1])
    twice = features.of([0, 1, 2, 1])
    twice.names = ["a.png", "b.png", "c.png", "d.png"]
    with pytest.raises(InputError, match=r"b\.png and d\.png are the same"):
        train(denoiser, twice, DPSGD(), QUIET)


def test_class_pictures_would_mix_into_the_gradients(denoiser, features):
    with pytest.raises((InputError, TrainingError)):
        train(denoiser, features, DPSGD(), replace(QUIET, batch=6), prior=features)


def test_a_factor_without_gradients_stops_the_run(denoiser, features):
    """opacus #820: hours of training, a falling epsilon, and nothing but noise in the weights."""

    class Broken(DPSGD):
        def start(self, run):
            super().start(run)
            del self._factors.factors[3].forward  # as when something replaced the module

    with pytest.raises(TrainingError, match=r"1 of .* factors have no gradient"):
        train(denoiser, features, Broken(), replace(QUIET, batch=6))


def test_the_file_tells_the_bound_and_nothing_of_the_data(denoiser, features):
    method = DPSGD()
    settings = replace(QUIET, steps=5, dp=DP(epsilon=4.0, delta=1e-2, clip=0.05, accountant="rdp"))
    outcome = train(denoiser, features, method, settings)
    spent = method.ledger.epsilon(5)
    facts = method.facts()
    assert outcome.facts == facts
    assert spent <= float(facts.pop("ss_privacy_epsilon")) <= min(4.0, spent * 1.01)
    assert facts == {
        "ss_privacy_method": "dp-sgd", "ss_privacy_delta": "0.01", "ss_privacy_unit": "record, add/remove",
        "ss_privacy_accountant": "rdp", "ss_privacy_clip": "0.05",
    }  # fmt: skip
    assert method.told() == "eps <= 4 (delta 1e-02)"
    method.after_step(1)  # only two steps were made
    assert float(method.facts()["ss_privacy_epsilon"]) < spent


def test_it_learns(denoiser, features):
    """With little noise the error falls: the gradients are of the pictures, and right way round."""
    from tests.finetune.test_loop import error_of

    before = error_of(denoiser, features)
    settings = Settings(steps=30, batch=6, lr=2e-2, targets="all", dp=DP(noise=0.01, clip=1.0))
    train(denoiser, features, DPSGD(), settings)
    assert error_of(denoiser, features) < 0.9 * before
    assert not hasattr(denoiser.trainable_adapter.parameters()[0], "grad_sample")
