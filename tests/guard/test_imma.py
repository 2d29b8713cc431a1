"""Immunisation against its two players written out by hand, and what it leaves of the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from diffward.errors import InputError, TrainingError
from diffward.finetune.sampler import generator
from diffward.guard import GUARDS, GuardSettings, Subject
from diffward.guard import imma as module
from diffward.guard.both import Rows
from diffward.guard.imma import Alternation, attention_of
from diffward.guard.settings import VARIANTS, ImmaOptions
from diffward.models.features import encode_pictures
from tests.guard.pairs import alone_and_shared

LR = {"inner_lr": 1e-2, "outer_lr": 2e-3}


def subject_of(denoiser: Any, pictures: Any, work: Path | None = None, **options: Any) -> Subject:
    features = encode_pictures(denoiser, pictures, cache=False)
    given = {"batch": 2, "steps": 6, "rank": 2, **LR, **options}
    settings = GuardSettings(imma=ImmaOptions(**given), seed=3)
    half = [0, 1, 2], [3, 4, 5]
    return Subject(denoiser, features.of(half[0]), features.of(half[1]), settings, work=work)


def found(subject: Subject) -> dict[str, Tensor]:
    edited = GUARDS["imma"].obj(subject).edited
    assert edited is not None
    return edited


def attention(unet: Any) -> set[str]:
    """Parameters of the projections of every attention, by the modules' classes."""
    from diffusers.models.attention_processor import Attention

    return {
        f"{name}.{inner}"
        for name, part in unet.named_modules()
        if isinstance(part, Attention)
        for inner, _ in part.named_parameters()
        if inner.startswith("to_")
    }


class ByHand:
    """AdamW with clipping, written from its definition, over a dictionary of tensors."""

    def __init__(self, lr: float) -> None:
        self.lr, self.n = lr, 0
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    def step(self, values: dict[str, Tensor], gradients: dict[str, Tensor], clip: float) -> None:
        self.n += 1
        norm = torch.sqrt(torch.stack([(g.double() ** 2).sum() for g in gradients.values()]).sum())
        scale = min(1.0, clip / (float(norm) + 1e-6))
        for name, g in gradients.items():
            g = g * scale
            self.first[name] = 0.9 * self.first.get(name, 0 * g) + 0.1 * g
            self.second[name] = 0.999 * self.second.get(name, 0 * g) + 0.001 * g**2
            m, v = self.first[name] / (1 - 0.9**self.n), self.second[name] / (1 - 0.999**self.n)
            values[name] = values[name] * (1 - self.lr * 0.01) - self.lr * m / (v.sqrt() + 1e-8)


def drawn_loss(denoiser: Any, subject: Subject, number: int, weights: dict[str, Tensor]) -> Tensor:
    """The diffusion loss of a step's pictures, epsilon prediction, at some weights."""
    domain = subject.illegal
    rows = Rows(len(domain), subject.settings.imma.batch, 3, module._ORDER)(number)
    g = generator(3, number, module._NOISE)
    t = torch.randint(1000, (len(rows),), generator=g)
    eps = torch.randn((len(rows), 4, 8, 8), generator=g)
    abar = denoiser.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * domain.latents[rows] + (1 - abar).sqrt() * eps
    out = functional_call(denoiser.unet, weights, (noisy, t, domain.conditioning(rows))).sample
    return ((out - eps) ** 2).mean()


def by_hand(denoiser: Any, subject: Subject, players: Callable[[int], str], down: Any) -> Any:
    """theta after every step, from the equations; `down` the LoRA's first A by module, None for full."""
    base = {n: p.detach().clone() for n, p in denoiser.unet.named_parameters()}
    names = attention(denoiser.unet)
    phi = dict(base) if down is None else {}
    for name, a in (down or {}).items():
        phi |= {
            f"{name}.A": a.clone(),
            f"{name}.B": torch.zeros(len(base[f"{name}.weight"]), len(a)),
        }
    theta = {n: base[n].clone() for n in base if n in names}
    inner, outer = ByHand(LR["inner_lr"]), ByHand(LR["outer_lr"])
    for number in range(subject.settings.imma.steps):
        who = players(number)
        if down is None:
            phi |= theta
        own = {
            n: v.clone().requires_grad_(True) for n, v in (phi if who == "user" else theta).items()
        }
        have = {**phi, **theta, **own}
        weights = {n: have.get(n, base[n]) for n in base}
        for name in down or {}:
            weights[f"{name}.weight"] = (
                weights[f"{name}.weight"] + have[f"{name}.B"] @ have[f"{name}.A"]
            )
        loss = drawn_loss(denoiser, subject, number, weights)
        gradients = torch.autograd.grad(loss if who == "user" else -loss, list(own.values()))
        if who == "user":
            inner.step(phi, dict(zip(own, gradients, strict=True)), 1.0)
            theta = {n: phi.get(n, theta[n]) for n in theta}
        else:
            outer.step(theta, dict(zip(own, gradients, strict=True)), 1.0)
    return theta


@pytest.mark.parametrize(("inner", "outer", "steps"), [(1, 1, 2), (1, 1, 4), (2, 1, 6)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_loop_that_the_equations_describe(
    tiny_denoiser: Any, pictures: Any, variant: str, inner: int, outer: int, steps: int
) -> None:
    options = {"variant": variant, "inner": inner, "outer": outer, "steps": steps}
    subject = subject_of(tiny_denoiser(), pictures, **options)
    down = None
    if variant == "lora":
        Alternation(subject, 1.0)
        layers = subject.denoiser.trainable_adapter.layers()
        down = {
            n.removeprefix("unet."): layer.lora_A["default"].weight.detach().clone()
            for n, layer in layers.items()
        }
        subject.denoiser.detach()
    got = found(subject)
    plain = tiny_denoiser()
    want = by_hand(
        plain, subject, lambda n: "user" if n % (inner + outer) < inner else "base", down
    )
    base = dict(plain.unet.named_parameters())
    assert set(got) == set(want) == attention(plain.unet)
    for name, value in want.items():
        moved = value - base[name].detach()
        # Adam's first steps have the gradient's sign: where it is all but zero, rounding decides.
        off = (got[name] - value).abs()
        assert float(off.mean()) < 0.01 * float(moved.abs().mean()), name
        assert float(moved.abs().mean()) > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_base_is_bit_for_bit_what_it_was(denoiser: Any, pictures: Any, variant: str) -> None:
    before = {n: p.detach().clone() for n, p in denoiser.unet.named_parameters()}
    found(subject_of(denoiser, pictures, variant=variant))
    after = dict(denoiser.unet.named_parameters())
    assert list(before) == list(after)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in after.values())


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "lora"},
        {"variant": "lora", "reinitialize": True},
        {"variant": "full", "inner": 2},
    ],
)
def test_resumed_it_is_the_same_run_bit_for_bit(
    tiny_denoiser: Any, pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    options = {**options, "steps": 7, "checkpoint_every": 2}
    whole = found(subject_of(tiny_denoiser(), pictures, tmp_path / "whole", **options))
    step, cut = Alternation.step, tmp_path / "cut"

    def stops(self: Alternation, number: int) -> float:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    denoiser = tiny_denoiser()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Alternation, "step", stops)
        found(subject_of(denoiser, pictures, cut, **options))
    made: list[int] = []
    monkeypatch.setattr(
        Alternation, "step", lambda self, number: made.append(number) or step(self, number)
    )
    torch.manual_seed(99)  # whatever ran before in this process
    again = found(subject_of(denoiser, pictures, cut, **options))
    assert made == [4, 5, 6]
    assert all(torch.equal(again[n], t) for n, t in whole.items())
    # A finished run is read, not made again.
    made.clear()
    assert all(
        torch.equal(t, whole[n])
        for n, t in found(subject_of(denoiser, pictures, cut, **options)).items()
    )
    assert made == []


def test_it_leaves_the_random_numbers_of_the_process_alone(denoiser: Any, pictures: Any) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found(subject_of(denoiser, pictures))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_runs_checkpoint_is_refused(
    tiny_denoiser: Any, pictures: Any, tmp_path: Path
) -> None:
    found(subject_of(tiny_denoiser(), pictures, tmp_path))
    with pytest.raises(InputError, match=r"another imma\.outer_lr"):
        found(subject_of(tiny_denoiser(), pictures, tmp_path, outer_lr=1e-4))


def test_the_loss_of_the_forbidden_domain_rises(denoiser: Any, pictures: Any) -> None:
    subject = subject_of(denoiser, pictures, steps=30)
    facts = GUARDS["imma"].obj(subject).facts
    assert facts["loss"]["illegal"]["after"] > 1.05 * facts["loss"]["illegal"]["before"]
    assert set(facts["loss"]) == {"illegal", "innocent"}


def test_a_user_who_starts_anew_starts_from_nothing(denoiser: Any, pictures: Any) -> None:
    for anew in (False, True):
        game = Alternation(subject_of(denoiser, pictures, reinitialize=anew), 1.0)
        first = game.phi[0].detach().clone()
        reach = first.shape[1] ** -0.5
        assert float(first.abs().max()) <= reach and float(first.std()) > reach / 3
        assert not any(bool(up.any()) for up in game.phi[1::2])
        game.step(0), game.step(1)
        kept = game.phi[0].detach().clone()
        moments = len(game.inner.state)
        game.step(2)
        step = float((game.phi[0].detach() - kept).abs().max())
        # A step of Adam is at most a few lr long; a new start is another LoRA.
        assert moments and (step > 0.05) == anew
        assert all(float(s["step"]) == (1 if anew else 2) for s in game.inner.state.values())
        denoiser.detach()


def test_each_step_moves_one_player(denoiser: Any, pictures: Any) -> None:
    game = Alternation(subject_of(denoiser, pictures), 1.0)
    theta = {n: p.detach().clone() for n, p in game.theta.items()}
    game.step(0)
    assert all(torch.equal(p, theta[n]) for n, p in game.theta.items())
    phi = [p.detach().clone() for p in game.phi]
    game.step(1)
    assert all(torch.equal(p, q) for p, q in zip(game.phi, phi, strict=True))
    assert not any(torch.equal(p, theta[n]) for n, p in game.theta.items())
    assert set(attention_of(denoiser.unet)) == set(theta)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_that_is_not_finite_stops_with_step_and_picture(
    denoiser: Any, pictures: Any, variant: str
) -> None:
    subject = subject_of(denoiser, pictures, variant=variant)
    before = {n: p.detach().clone() for n, p in denoiser.unet.named_parameters()}
    game = module.Alternation
    original = game.loss

    def poisoned(self: Alternation, number: int) -> Tensor:
        if number == 2:
            self.subject.illegal.latents[1] = float("nan")
            self._rows = lambda step: torch.tensor([0, 1])  # type: ignore[assignment]
        return original(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(game, "loss", poisoned)
        with pytest.raises(TrainingError, match=r"step 2 .* not finite for 1\.png;"):
            found(subject)
    assert all(torch.equal(p, before[n]) for n, p in denoiser.unet.named_parameters())


def test_a_broken_base_is_an_error(denoiser: Any, pictures: Any) -> None:
    before = {n: p.detach().clone() for n, p in denoiser.unet.named_parameters()}
    with pytest.raises(TrainingError, match=r"at step \d+: .* has broken the base"):
        found(subject_of(denoiser, pictures, steps=60, outer_lr=0.1, inner_lr=1e-5, limit=1.5))
    assert all(torch.equal(p, before[n]) for n, p in denoiser.unet.named_parameters())


def test_bad_options_are_refused(denoiser: Any, pictures: Any) -> None:
    for options in (
        {"variant": "both"}, {"steps": 1}, {"inner": 0}, {"rank": 0}, {"outer_lr": 0.0}, {"clip": -1.0},
        {"variant": "full", "reinitialize": True},
    ):  # fmt: skip
        with pytest.raises(InputError, match="--imma"):
            ImmaOptions(**options)  # type: ignore[arg-type]
    subject = subject_of(denoiser, pictures)
    with pytest.raises(InputError, match="--illegal"):
        found(replace(subject, illegal=subject.illegal.of([])))


def test_activations_recomputed_give_the_same(tiny_denoiser: Any, pictures: Any) -> None:
    plain = found(subject_of(tiny_denoiser(), pictures, steps=4))
    subject = subject_of(tiny_denoiser(), pictures, steps=4)
    subject.settings = replace(subject.settings, gradient_checkpointing=True)
    again = found(subject)
    assert all(torch.allclose(again[n], t, atol=1e-5) for n, t in plain.items())


def _immunise(rank: int, folder: Path, port: int) -> None:
    import torch.distributed as dist

    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features, encode_captions
    from tests.conftest import make_pipeline

    torch.set_num_threads(1)
    if port:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
        )
    denoiser = Denoiser(make_pipeline(), "tiny")
    g = torch.Generator().manual_seed(3)
    latents = torch.randn((6, *denoiser.latent_shape), generator=g) * 0.3
    embeddings, index = encode_captions(denoiser, ["a red cup"] * 6, cache=False)
    features = Features(latents, ["a red cup"] * 6, ["red"] * 6, embeddings, index)
    # `batch` is what one process takes, as in training.
    options = ImmaOptions(steps=4, rank=2, batch=2 if port else 4, checkpoint_every=2, **LR)
    subject = Subject(
        denoiser, features, features.of([]), GuardSettings(imma=options, seed=3), folder / f"{port > 0}-{rank}"
    )  # fmt: skip
    each, sizes = module.each_loss, set()

    def counted(denoiser: Any, domain: Any, rows: Tensor, *rest: Any) -> Tensor:
        sizes.add(len(rows))
        return each(denoiser, domain, rows, *rest)

    module.each_loss = counted  # a process of its own, or put back below
    try:
        torch.save(found(subject), folder / f"{port > 0}-{rank}.pt")
    finally:
        module.each_loss = each
    assert sizes == {2 if port else 4}
    assert (folder / f"{port > 0}-{rank}" / "imma.pt").exists() == (rank == 0)
    if port:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_immunise_one_base(tmp_path: Path) -> None:
    """Half of every batch each: together what one process does with batches twice as large."""
    alone, first, second = alone_and_shared(_immunise, tmp_path)
    for name in alone:
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], alone[name], atol=1e-4)
