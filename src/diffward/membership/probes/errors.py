"""The denoising error, under the picture's caption, no caption and shortened captions."""

from __future__ import annotations

import torch
from torch import Tensor

from diffward.membership.captions import SHARES
from diffward.membership.probe import PROBES, Query


@PROBES.register("errors", evaluations=lambda layout: len(layout.timesteps), paired=True)
def errors(query: Query) -> Tensor:
    """Errors (n, K) at every pair, under the caption."""
    everything = list(range(len(query.pairs)))
    return query.errors_at(query.latents, everything, query.text("caption"))


@PROBES.register("errors_null", evaluations=lambda layout: len(layout.middle), paired=True)
def errors_null(query: Query) -> Tensor:
    """Errors (n, middle) under the empty caption."""
    return query.errors_at(query.latents, query.layout.middle.tolist(), query.text("null"))


@PROBES.register(
    "errors_reduced", evaluations=lambda layout: len(SHARES) * len(layout.middle), paired=True
)
def errors_reduced(query: Query) -> Tensor:
    """Errors (n, shares, middle) under captions that lost their most telling words."""
    middle = query.layout.middle.tolist()
    parts = [
        query.errors_at(query.latents, middle, query.text(f"reduced{i}"))
        for i in range(len(SHARES))
    ]
    return torch.stack(parts, dim=1)
