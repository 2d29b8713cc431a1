"""Losses of the domains: of drawn pictures with gradient, and of both domains on fixed noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.finetune.finite import check_finite
from diffward.guard.processes import shared
from diffward.guard.subject import Subject
from diffward.models.pairs import Pairs
from diffward.models.parameters import put

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

DOMAINS = ("illegal", "innocent")
PICTURES, PAIRS = 64, 8


def each_loss(
    denoiser: Denoiser, domain: Features, rows: Tensor, t: Tensor, eps: Tensor, where: str, option: str
) -> Tensor:  # fmt: skip
    """Loss (n,) of pictures `rows` (n,) of a domain under t (n,) and eps (n, C, h, w), with gradient.

    Raises:
        TrainingError: one is not finite; see `check_finite` for `where` and `option`.
    """
    there = rows.to(denoiser.device)
    errors = denoiser.errors(
        domain.latents[there], t.to(denoiser.device), eps.to(denoiser.device), domain.conditioning(there)
    )  # fmt: skip
    each = errors.mean(dim=(1, 2, 3))
    check_finite(each, rows, domain, where, option)
    return each


def spread(count: int, most: int) -> Tensor:
    """Rows of at most `most` of `count` pictures, evenly over all of them: a domain may be several folders."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def losses_now(subject: Subject) -> dict[str, float]:
    """Mean loss of up to 64 pictures of each domain that has any, at the weights that the UNet has."""
    pairs = Pairs.draw(subject.denoiser, PAIRS, subject.settings.seed)
    domains = dict(zip(DOMAINS, (subject.illegal, subject.innocent), strict=True))
    return {
        name: float(pairs.errors(subject.denoiser, one, spread(len(one), PICTURES)).mean())
        for name, one in domains.items() if len(one)
    }  # fmt: skip


def losses_of(subject: Subject, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The same with `weights` on the base, which is put back."""
    try:
        put(subject.denoiser.unet, weights)
        return losses_now(subject)
    finally:
        if weights:
            subject.restore()


def gains(subject: Subject) -> tuple[float, float]:
    """By how much full fine-tuning lowers the loss of the illegal and of the innocent domain.

    Raises:
        InputError: it does not; then there is nothing to prevent, or nothing to keep.
    """
    states: list[Mapping[str, Tensor]] = [{}, subject.tuned]
    base, tuned = (
        dict(zip(DOMAINS, shared(tuple(losses_of(subject, some)[d] for d in DOMAINS)), strict=True))
        for some in states
    )
    for domain in base:
        if not tuned[domain] < base[domain]:
            raise InputError(
                f"--{domain}: {subject.settings.tune_steps} steps of full fine-tuning do not lower the loss "
                f"({base[domain]:.4g} to {tuned[domain]:.4g}); raise --tune-steps or --user-lr, with another --out"
            )
    illegal, innocent = (base[domain] - tuned[domain] for domain in DOMAINS)
    return illegal, innocent
