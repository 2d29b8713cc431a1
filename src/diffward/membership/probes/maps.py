"""Where in the latent the model errs, at random times."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffward.membership.probe import PROBES, Query

DRAWS = 8


@PROBES.register("maps", evaluations=lambda layout: DRAWS, paired=False)
def maps(query: Query) -> Tensor:
    """Squared error maps (n, DRAWS, C, h, w) at random (t, eps), others for each picture.

    They are drawn by the place of the picture among the audited ones, so the same for both models
    and without a look at its label. That t varies from picture to picture, and that an attack is
    not told which, belongs to the attack on these maps.
    """
    denoiser, n = query.denoiser, len(query.latents)
    steps = denoiser.schedule.config.num_train_timesteps
    drawn = [np.random.default_rng([query.pairs.seed, row]) for row in query.rows.tolist()]
    t = torch.from_numpy(np.stack([rng.integers(steps, size=DRAWS) for rng in drawn]))
    shape = (DRAWS, *query.latents.shape[1:])
    eps = torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in drawn]))
    t, eps = (x.flatten(0, 1).to(query.latents.device) for x in (t, eps))
    picture = torch.arange(n, device=t.device).repeat_interleave(DRAWS)
    latents = query.latents[picture]
    said = query.predict(denoiser.noise(latents, t, eps), t, query.text("caption")[picture])
    return ((said - denoiser.target(latents, t, eps)) ** 2).unflatten(0, (n, DRAWS))
