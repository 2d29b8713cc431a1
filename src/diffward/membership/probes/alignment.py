"""Does the model lie where a picture's own gradient pulls? Cosines of that pull on the bare base with what was learned.

From B = 0 the first change of W = B A under a gradient G of W is proportional to G Aᵀ A, for a random A to G V Vᵀ, with
V the right singular vectors of the change that was learned, U S Vᵀ. So -G is compared with the change after projection
on V, which does not depend on how the change was factored:

    cos(-G V Vᵀ, U S Vᵀ) = -<G V, U S> / (||G V|| ||S||)

with G V = sum_p g_p (Vᵀ x_p)ᵀ over a module's inputs x and gradients g at its output (see `gradients`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffward.lora.canonical import Canonical, canonical_factors
from diffward.membership.factors import along_factors
from diffward.membership.probe import PROBES, Query
from diffward.membership.probes.gradients import gradient_pairs, slopes

_TINY = 1e-20
_RANK = 1e-4  # of the largest singular value: smaller ones are rounding


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
    changes: dict[str, Canonical] = {}
    downs: dict[str, dict[str, Tensor]] = {}
    for name, module in query.factors().modules.items():
        down, up = module.tensors["down"], module.tensors["up"]
        one = canonical_factors(down.flatten(1), up.flatten(1), module.scale)
        if one.sigma[0] > 0:
            one = one.top(int((one.sigma > _RANK * one.sigma[0]).sum()))
            one = Canonical(*(x.to(query.latents.device) for x in (one.u, one.sigma, one.v)))
            changes[name] = one
            # Of the two gradients that `along_factors` gives, the one along `up` is G V; the other is not needed.
            downs[name] = {
                "down": one.v.T.reshape(-1, *down.shape[1:]),
                "up": one.u.new_zeros(len(one.u), 1),
            }
    totals: dict[str, Tensor] = {}
    with query.denoiser.bare():
        for picture, name, layer, x, slope in slopes(query, changes):
            _, part = along_factors(layer, downs[name], x, slope)
            if name not in totals:
                totals[name] = part.new_zeros((len(query.latents), *part.shape[1:]))
            totals[name].index_add_(0, picture, part)
    if not totals:
        return torch.zeros((len(query.latents), 0))
    return torch.stack([_cosine(seen, changes[name]) for name, seen in totals.items()], dim=1)


def _cosine(seen: Tensor, change: Canonical) -> Tensor:
    """(n,) of G V (n, out, r)."""
    length = (seen.square().sum((1, 2)) + _TINY).sqrt() * change.sigma.norm()
    return -(seen * change.u * change.sigma).sum((1, 2)) / length
