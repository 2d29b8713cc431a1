"""How much noise the model sees in a clean picture."""

from __future__ import annotations

import torch
from torch import Tensor

from diffward.membership.probe import PROBES, Query
from diffward.membership.schedule import eps_of, moment

# The authors try t = 0, 10 ... 190 of 1,000 on Stable Diffusion and print the best on the pictures
# they judge. The middle of what they try is fixed here.
T, P = 100, 4


@PROBES.register("sima", evaluations=lambda layout: 1, width=1, paired=False)
def sima(query: Query) -> Tensor:
    """||eps(z_0, t, c)||_4 (n,): the clean latent is given as if it were noisy."""
    t = moment(query.denoiser, T, query.latents)
    prediction = query.predict(query.latents, t, query.text("caption"))
    eps = eps_of(query.denoiser, prediction, query.latents, t)
    return torch.linalg.vector_norm(eps.flatten(1), ord=P, dim=1)
