"""How far the model's noise for a clean picture is from its noise for that picture so noised."""

from __future__ import annotations

import torch
from torch import Tensor

from diffward.membership.probe import PROBES, Query
from diffward.membership.schedule import eps_of, moment

T, P = 500, 4  # of 1,000, for Stable Diffusion, and the norm (Kong et al. 2024)


@PROBES.register("pia", evaluations=lambda layout: 3, width=1, paired=False)
def pia(query: Query) -> Tensor:
    """||e - eps(sqrt(abar_t) z_0 + sqrt(1 - abar_t) e, t, c)||_4 (n, 2), for e = e0 (PIA) and normalised e0 (PIAN).

    e0 = eps(z_0, 0, c), asked once for both. PIAN makes it as large as Gaussian noise,
    e0 sqrt(2 / pi) / mean|e0|: as in the authors' code, and as E|N(0, 1)| = sqrt(2 / pi) demands.
    Equation 10 of the paper has sqrt(pi / 2).
    """
    denoiser, z0, text = query.denoiser, query.latents, query.text("caption")
    start, t = moment(denoiser, 0, z0), moment(denoiser, T, z0)
    e0 = eps_of(denoiser, query.predict(z0, start, text), z0, start)
    unit = e0 * (2 / torch.pi) ** 0.5 / e0.abs().mean((1, 2, 3), keepdim=True)
    distances = []
    for e in (e0, unit):
        noisy = denoiser.noise(z0, t, e)
        back = eps_of(denoiser, query.predict(noisy, t, text), noisy, t)
        distances.append(torch.linalg.vector_norm((e - back).flatten(1), ord=P, dim=1))
    return torch.stack(distances, dim=1)
