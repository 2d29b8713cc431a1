"""Errors of centre crops: the neighbours of a picture that PFAMI compares it with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffward.membership.layout import Layout
from diffward.membership.probe import PROBES, Query

LARGEST, SMALLEST = 0.95, 0.7  # share of the side (Fu et al. 2023)


def crop_shares(layout: Layout) -> list[float]:
    """Share of the side that crop j keeps, one for each of the less noisy pairs."""
    return np.linspace(LARGEST, SMALLEST, len(layout.early)).tolist()


@PROBES.register("crops", evaluations=lambda layout: len(layout.early), paired=True)
def crops(query: Query) -> Tensor:
    """Errors (n, early): crop j at the j-th of the less noisy pairs, with the picture's own noise."""
    early = query.layout.early.tolist()
    latents = torch.stack([query.crops(share) for share in crop_shares(query.layout)], dim=1)
    n, device = len(latents), latents.device
    t, eps = query.pairs.t[early].to(device), query.pairs.eps[early].to(device)
    text = query.text("caption").repeat_interleave(len(early), dim=0)
    errors = query.errors(latents.flatten(0, 1), t.repeat(n), eps.repeat(n, 1, 1, 1), text)
    return errors.view(n, len(early))
