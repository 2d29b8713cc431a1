"""Masks that need no bilevel learning: at random, by size of the change, by Fisher, by first order, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from diffward.finetune.sampler import generator
from diffward.guard.losses import DOMAINS, each_loss, gains, losses_of, spread
from diffward.guard.subject import BOTH, GUARDS, MASKS, TUNING, Found, Subject
from diffward.models.parameters import parameters_of, put

if TYPE_CHECKING:
    from diffward.models.features import Features

PICTURES, PAIRS = 64, 4  # of each domain, and noise draws a picture


@GUARDS.register(
    "random", paper="FreezeAsGuard, Table 1", access="base", cost="none", domains=(), options=MASKS
)
def random(subject: Subject) -> Found:
    """Random freezing: what any learned mask must beat."""
    g = torch.Generator().manual_seed(subject.settings.seed)
    return Found(scores=torch.rand(len(subject.names), generator=g, dtype=torch.float64))


@GUARDS.register(
    "magnitude", access="base, pictures of both domains", cost="full fine-tuning on both domains", domains=BOTH,
    options=MASKS | TUNING,
)  # fmt: skip
def magnitude(subject: Subject) -> Found:
    """The tensors that full fine-tuning moves most, per parameter: mean |theta_ft - theta_pre|."""
    base, tuned = subject.base, subject.tuned
    gains(subject)
    return Found(
        scores=torch.stack(
            [(tuned[n] - base[n]).abs().mean().cpu().double() for n in subject.names]
        )
    )


@GUARDS.register(
    "fisher", paper="Kirkpatrick et al. 2017 (diagonal Fisher)", access="base, pictures of both domains",
    cost="a backward pass a picture and noise draw", domains=BOTH, options=MASKS,
)  # fmt: skip
def fisher(subject: Subject) -> Found:
    """The tensors that the forbidden domain pulls at more than the allowed one: log ratio of mean g^2 at the base.

    g is the gradient of one picture's loss under one noise draw.
    """
    ill, inn = (_squares(subject, domain) for domain in (subject.illegal, subject.innocent))
    tiny = torch.finfo(torch.float64).tiny
    return Found(scores=(ill + tiny).log() - (inn + tiny).log())


@GUARDS.register(
    "first-order", access="base, pictures of both domains",
    cost="full fine-tuning on both domains, and a backward pass a batch of pictures", domains=BOTH,
    options=MASKS | TUNING,
)  # fmt: skip
def first_order(subject: Subject) -> Found:
    """What taking each tensor back would cost, to first order: <theta_pre - theta_ft, g>, illegal less innocent, at theta_ft."""
    base, tuned = subject.base, subject.tuned
    gains(subject)
    put(subject.denoiser.unet, tuned)
    try:
        pulls = []
        for domain in (subject.illegal, subject.innocent):
            gradients = _gradients(subject, domain)
            found = torch.stack(
                [((base[n] - tuned[n]) * g).sum().cpu().double() for n, g in gradients.items()]
            )
            pulls.append(found / found.abs().sum())
    finally:
        subject.restore()
    return Found(scores=(pulls[0] - pulls[1]) / subject.costs)


@GUARDS.register(
    "blocks", access="base, pictures of both domains",
    cost="full fine-tuning on both domains, and a forward pass a block", domains=BOTH, options=MASKS | TUNING,
)  # fmt: skip
def blocks(subject: Subject) -> Found:
    """Whole blocks: each taken back alone, by what the forbidden domain loses less what the allowed one does."""
    base, tuned, names = subject.base, subject.tuned, subject.names
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(block_of(name), []).append(name)
    cost = dict(zip(names, subject.costs.tolist(), strict=True))
    gained, whole = dict(zip(DOMAINS, gains(subject), strict=True)), losses_of(subject, tuned)
    score: dict[str, float] = {}
    for block, members in groups.items():
        taken_back = {name: (base if name in members else tuned)[name] for name in names}
        lost = losses_of(subject, taken_back)
        share = {d: (lost[d] - whole[d]) / gained[d] for d in lost}
        score[block] = (share["illegal"] - share["innocent"]) / sum(cost[n] for n in members)
    return Found(scores=torch.tensor([score[block_of(n)] for n in names], dtype=torch.float64))


def block_of(name: str) -> str:
    """The resnet, attention block or sampler that a parameter belongs to: `up_blocks.1.attentions.0`."""
    parts = name.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        return ".".join(parts[:4])
    return ".".join(parts[:3]) if parts[0] == "mid_block" else parts[0]


def _gradients(subject: Subject, domain: Features) -> dict[str, Tensor]:
    """Gradient of the mean loss of some pictures of a domain, by tensor, at the weights that the UNet has."""
    with _with_gradients(subject) as own:
        for _ in _passes(subject, domain, subject.settings.batch, "--user-lr"):
            pass
        count = _draws(domain)
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad / count for n, p in own.items()
        }


def _squares(subject: Subject, domain: Features) -> Tensor:
    """(N,): mean over a tensor's entries and over single pictures and draws of the squared gradient."""
    with _with_gradients(subject) as own:
        total = torch.zeros(len(own), dtype=torch.float64)
        for _ in _passes(subject, domain, 1):
            there = [i for i, p in enumerate(own.values()) if p.grad is not None]
            norms = torch._foreach_norm([p.grad for p in own.values() if p.grad is not None])
            total[there] += torch.stack(norms).cpu().double() ** 2
            for p in own.values():
                p.grad = None
        sizes = torch.tensor([p.numel() for p in own.values()], dtype=torch.float64)
        return total / _draws(domain) / sizes


@contextmanager
def _with_gradients(subject: Subject) -> Iterator[dict[str, Parameter]]:
    """Within the block all weights of the UNet take gradients."""
    unet = subject.denoiser.unet
    own = parameters_of(unet)
    unet.requires_grad_(True)
    try:
        yield own
    finally:
        unet.requires_grad_(False)
        for p in own.values():
            p.grad = None


def _draws(domain: Features) -> int:
    """Pictures times noise draws that a ranking looks at."""
    return min(len(domain), PICTURES) * PAIRS


def _passes(subject: Subject, domain: Features, size: int, option: str = "") -> Iterator[None]:
    """A backward pass of the summed loss of `size` draws at a time, t spread evenly over all of them."""
    denoiser, settings = subject.denoiser, subject.settings
    steps = denoiser.schedule.config.num_train_timesteps
    rows = spread(len(domain), PICTURES).repeat(PAIRS)
    g = generator(settings.seed, 0, 99)
    t = ((torch.randperm(len(rows), generator=g) + 0.5) * steps / len(rows)).long()
    eps = torch.randn((len(rows), *denoiser.latent_shape), generator=g)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        each_loss(
            denoiser, domain, rows[part], t[part], eps[part], "ranking", option
        ).sum().backward()
        yield
