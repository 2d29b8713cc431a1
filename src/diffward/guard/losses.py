"""Losses of both domains under some weights, on fixed noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffward.guard.stored import put
from diffward.guard.subject import Subject
from diffward.models.pairs import Pairs

PICTURES, PAIRS = 64, 8


def spread(count: int, most: int) -> Tensor:
    """Rows of at most `most` of `count` pictures, evenly over all of them: a domain may be several folders."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def losses_of(subject: Subject, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean loss of up to 64 pictures of either domain with `weights` on the base, which is put back."""
    denoiser = subject.denoiser
    pairs = Pairs.draw(denoiser, PAIRS, subject.settings.seed)
    try:
        put(denoiser.unet, weights)
        return {
            name: float(pairs.errors(denoiser, domain, spread(len(domain), PICTURES)).mean())
            for name, domain in (("illegal", subject.illegal), ("innocent", subject.innocent))
        }
    finally:
        if weights:
            subject.restore()
