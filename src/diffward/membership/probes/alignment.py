"""Does the model lie where a picture's own gradient pulls? Cosines of that pull on the bare base with what was learned.

`lora.canonical.Canonical.alignment` of G V = sum_p g_p (Vᵀ x_p)ᵀ, over a module's inputs x and gradients g at its output
(see `gradients`), V the right singular vectors of the change. It does not depend on how the change was factored. What is
compared is `own_factors`: of DoRA without the magnitude, of a full model the strongest part of its change, whose first
step was not confined to V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffward.lora.canonical import Canonical, canonical_factors
from diffward.membership.factors import along_factors
from diffward.membership.probe import BASE_CAPTION, PROBES, Query
from diffward.membership.probes.gradients import gradient_pairs, slopes


@PROBES.register(
    "alignment",
    evaluations=lambda layout: 3 * len(gradient_pairs(layout)),
    paired=False,
    factors=True,
)
def alignment(query: Query) -> Tensor:
    """Cosines (n, M) by UNet module, in the order in which it calls them, of the gradient averaged over timesteps.

    Modules that learned nothing or are never called are left out. The adapter is off either way: of a model that is
    `ON` the change is its own, of the base a random one.
    """
    if "changes" not in query.kept:
        query.kept["changes"] = _changes(query)
    changes: dict[str, Canonical]
    downs: dict[str, dict[str, Tensor]]
    changes, downs = query.kept["changes"]
    totals: dict[str, Tensor] = {}
    with query.denoiser.bare():
        for picture, name, layer, x, slope in slopes(query, changes, BASE_CAPTION):
            _, part = along_factors(layer, downs[name], x, slope)
            if name not in totals:
                totals[name] = part.new_zeros((len(query.latents), *part.shape[1:]))
            totals[name].index_add_(0, picture, part)
    if not totals:
        return torch.zeros((len(query.latents), 0))
    return torch.stack([changes[name].alignment(seen) for name, seen in totals.items()], dim=1)


def _changes(query: Query) -> tuple[dict[str, Canonical], dict[str, dict[str, Tensor]]]:
    """Of each module that learned something its change, and factors along whose `up` the gradient is G V."""
    changes, downs = {}, {}
    for name, module in query.factors().modules.items():
        down, up = module.tensors["down"], module.tensors["up"]
        one = canonical_factors(down.flatten(1), up.flatten(1), module.scale)
        if one.sigma[0] > 0:
            changes[name] = one = one.significant().to(query.latents.device)
            downs[name] = {
                "down": one.v.T.reshape(-1, *down.shape[1:]),
                "up": one.u.new_zeros(len(one.u), 1),  # the gradient along `down` is not needed
            }
    return changes, downs
