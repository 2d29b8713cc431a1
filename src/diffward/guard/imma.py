"""Immunisation: attention weights from which a simulated adaptation to the forbidden domain gets nowhere.

Zheng & Yeh 2024 (arXiv 2311.18815), written from its equations:

    max_theta L(D; theta, phi*),  phi* = argmin_phi L(D; theta, phi),

L the diffusion loss on the forbidden domain D, by alternating first-order steps: `inner` steps of AdamW down
L with respect to phi, then `outer` ones of AdamW up L with respect to theta, each on a batch of its own; no
gradient flows through the inner steps. theta are the projections of all attention, self and cross. phi is a
LoRA on them (`lora`), or all weights of the UNet (`full`, which theta is part of: inner steps on theta
stay, those on other weights are dropped at the end). Only theta is given back.

The ascent has no bound. Past `limit` times the base's loss the run stops with an error and gives nothing, as it
does at a loss that is not finite; on a UNet that normalises before its last convolution the loss levels off, and
a base may be of no use to anybody well below that. The innocent domain plays no part, so the facts tell the
losses of both domains before and after: on `mini` they rise together.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from diffward.errors import InputError, TrainingError
from diffward.finetune.adamw import adamw
from diffward.finetune.checkpoint import Checkpoint
from diffward.finetune.sampler import generator
from diffward.guard.both import Rows, part
from diffward.guard.losses import each_loss, losses_now
from diffward.guard.processes import average, world
from diffward.guard.subject import GUARDS, Found, Subject
from diffward.models.adapters import ATTENTION
from diffward.models.parameters import parameters_of, put
from diffward.progress import progress

_ORDER, _NOISE, _START = 23, 101, 102  # streams of random numbers


@GUARDS.register(
    "imma", paper="Zheng & Yeh 2024 (arXiv 2311.18815), from its equations",
    access="base, pictures of the forbidden domain", cost="imma.steps training steps; full: AdamW on all weights",
    domains=("illegal",), options=frozenset({"imma", "gradient_checkpointing"}),
)  # fmt: skip
def imma(subject: Subject) -> Found:
    """Immunised attention: moved so that a simulated LoRA or full fine-tuning does not learn the forbidden domain.

    Raises:
        InputError: no pictures, or the checkpoint is another run's.
        TrainingError: a loss was not finite, or passed `limit` times the base's.
    """
    denoiser, settings = subject.denoiser, subject.settings
    if not len(subject.illegal):
        raise InputError("--illegal: no picture in it")
    denoiser.detach()
    subject.base  # noqa: B018 (written before anything trains)
    before = losses_now(subject)
    if settings.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    try:
        edited = Alternation(subject, before["illegal"]).run()
    finally:
        if settings.gradient_checkpointing:
            denoiser.unet.disable_gradient_checkpointing()
        denoiser.detach()
        subject.restore()
    try:
        put(denoiser.unet, edited)
        after = losses_now(subject)
    finally:
        subject.restore()
    _check_bound(after["illegal"], before["illegal"], settings.imma.limit, "at the end")
    facts = {
        "variant": settings.imma.variant, "tensors": len(edited),
        "loss": {name: {"before": before[name], "after": after[name]} for name in before},
    }  # fmt: skip
    return Found(edited=edited, facts=facts)


def attention_of(unet: nn.Module) -> dict[str, nn.Parameter]:
    """theta by name: weights and biases of the projections of every attention."""
    suffixes = tuple(f".{module}" for module in ATTENTION)
    return {n: p for n, p in parameters_of(unet).items() if n.rpartition(".")[0].endswith(suffixes)}


class Alternation:
    """The two players and their steps; a step is a function of its number and of the state before it.

    Attributes:
        theta: what the publisher moves, by name.
        phi: what the user moves.
    """

    def __init__(self, subject: Subject, base_loss: float) -> None:
        self.subject, self.base_loss = subject, base_loss
        self.options = subject.settings.imma
        told = _identity(subject)
        unet = subject.denoiser.unet
        if self.options.variant == "lora":
            rank = self.options.rank
            with torch.random.fork_rng():  # PEFT draws a start of its own
                adapter = subject.denoiser.inject(rank, rank, ATTENTION, text_encoder=False)
            self.phi = adapter.parameters()
            self._fresh(0)
        else:
            self.phi = list(parameters_of(unet).values())
        self.theta = attention_of(unet)
        if not self.theta:
            raise InputError(
                f"base {subject.denoiser.name}: its UNet has no attention that imma knows"
            )
        self.inner, self.outer = (
            adamw(own, lr, self.options.weight_decay)
            for own, lr in zip(
                (self.phi, list(self.theta.values())), self.options.rates, strict=True
            )
        )
        self._rows = Rows(len(subject.illegal), self.options.batch, subject.settings.seed, _ORDER)
        moving = {id(p): p for p in [*self.phi, *self.theta.values()]}
        path = subject.work / "imma.pt" if subject.work else None
        self._saved = Checkpoint(
            path, list(moving.values()), self.inner, told, {"outer": _Part(self.outer)}
        )

    def run(self) -> dict[str, Tensor]:
        """All steps that are left; gives theta, on the CPU."""
        options = self.options
        done, losses = self._saved.load()
        with progress("immunise", options.steps, done) as bar:
            while done < options.steps:
                losses.append(self.step(done))
                done += 1
                bar.advance(
                    f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}, base {self.base_loss:.4f}"
                )
                if done % options.checkpoint_every == 0 or done == options.steps:
                    self._save(done, losses)
        return {name: p.detach().cpu().clone() for name, p in self.theta.items()}

    def _save(self, done: int, losses: list[float]) -> None:
        if not world()[1]:
            self._saved.save(done, losses)

    def step(self, number: int) -> float:
        """Step `number` (from 0), the user's or the publisher's; gives the loss before it.

        Raises:
            TrainingError: that loss is not finite (with the step and the pictures) or too high.
        """
        options = self.options
        turn, place = divmod(number, options.inner + options.outer)
        users = place < options.inner
        if options.reinitialize and place == 0 and number:
            self._fresh(turn)
            self.inner.state.clear()
        own = self.phi if users else list(self.theta.values())
        optimizer = self.inner if users else self.outer
        self.subject.denoiser.unet.requires_grad_(False)
        for parameter in own:
            parameter.requires_grad_(True)
        loss = self.loss(number)
        mean = loss.detach().clone()
        average(mean)
        value = float(mean)
        _check_bound(value, self.base_loss, options.limit, f"at step {number}")
        (loss if users else -loss).backward()
        for parameter in own:
            if parameter.grad is not None:
                average(parameter.grad)
        if options.clip:
            torch.nn.utils.clip_grad_norm_(own, options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    def loss(self, number: int) -> Tensor:
        """Mean loss of this process's pictures of a step, with gradient; t uniform."""
        denoiser, domain = self.subject.denoiser, self.subject.illegal
        rows = self._rows(number)
        g = generator(self.subject.settings.seed, number, _NOISE)
        t = torch.randint(denoiser.schedule.config.num_train_timesteps, (len(rows),), generator=g)
        eps = torch.randn((len(rows), *denoiser.latent_shape), generator=g)
        own = part()
        return each_loss(
            denoiser, domain, rows[own], t[own], eps[own], f"step {number} of imma",
            "--imma.inner-lr and --imma.outer-lr",
        ).mean()  # fmt: skip

    @torch.no_grad()
    def _fresh(self, turn: int) -> None:
        """A new LoRA, as training starts one: down uniform within 1 / sqrt(fan in), up zero."""
        g = generator(self.subject.settings.seed, turn, _START)
        for down, up in zip(self.phi[::2], self.phi[1::2], strict=True):
            reach = down[0].numel() ** -0.5
            down.copy_((torch.rand(down.shape, generator=g) * 2 - 1) * reach)
            up.zero_()


class _Part:
    """An optimizer as a part of a checkpoint."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def _identity(subject: Subject) -> dict[str, Any]:
    """What must not change between a run and its resumption; asked for while the base is untouched."""
    told = {
        f"imma.{k}": v for k, v in asdict(subject.settings.imma).items() if k != "checkpoint_every"
    }
    return {
        **told, "seed": subject.settings.seed, "illegal": subject.illegal.digest(),
        "base": subject.denoiser.unet_identity, "precision": str(subject.denoiser.compute_dtype),
        "processes": world()[0],
    }  # fmt: skip


def _check_bound(loss: float, base: float, limit: float, when: str) -> None:
    if not loss < float("inf") or (limit and loss > limit * base):
        raise TrainingError(
            f"imma, {when}: the loss is {loss:.3g}, {base:.3g} at the base; the ascent has broken the base: lower "
            "--imma.outer-lr or --imma.steps"
        )
