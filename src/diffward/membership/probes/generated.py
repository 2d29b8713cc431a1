"""How much pictures drawn from a picture's caption look like it: all that a black box shows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffward.membership.probe import PROBES, Query
from diffward.models.sampling import sample_latents

DRAWN = 2  # pictures a caption (Pang & Wang 2025: 3)
STEPS = 10
GUIDANCE = 5.0


@PROBES.register(
    "generated", evaluations=lambda layout: DRAWN * STEPS * 2, width=DRAWN * 2, paired=False
)
def generated(query: Query) -> Tensor:
    """Similarities (n, R drawn, 3), higher = more alike.

    0: cosine of the 2 x 2 pooled latents, each less its mean over places; 1: minus the root mean
    square difference of the latents; 2: the same of the pooled latents. Latents of what was drawn
    are compared as they come: decoding and encoding again would only add noise.

    Drawn with DPM-Solver++, of second order and without noise on the way, whatever the base's own
    sampler: 10 steps are enough for it. The starting noise goes by the picture's row: both models
    start from the same.
    """
    from diffusers import DPMSolverMultistepScheduler

    denoiser, latents = query.denoiser, query.latents
    seeds = (query.rows.cpu()[:, None] * DRAWN + torch.arange(DRAWN)).flatten().tolist()
    captions, null = (
        query.text(name).repeat_interleave(DRAWN, dim=0) for name in ("caption", "null")
    )
    size = max(1, query.batch // 2)  # guidance asks twice
    drawn = torch.cat(
        [
            sample_latents(
                denoiser,
                captions[i : i + size],
                null[i : i + size],
                [torch.Generator().manual_seed(seed) for seed in seeds[i : i + size]],
                steps=STEPS,
                guidance=GUIDANCE,
                scheduler=DPMSolverMultistepScheduler.from_config(denoiser.sampler.config),
            )
            for i in range(0, len(seeds), size)
        ]
    )
    answers = similarities(latents.repeat_interleave(DRAWN, dim=0), drawn.to(latents))
    return answers.view(len(latents), DRAWN, -1)


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """(m, 3) of latents (m, C, h, w), as `generated` says."""
    pooled = [F.avg_pool2d(z, 2) for z in (first, second)]
    one, other = ((z - z.mean((2, 3), keepdim=True)).flatten(1) for z in pooled)
    return torch.stack(
        [
            F.cosine_similarity(one, other, dim=1),
            -(first - second).square().mean((1, 2, 3)).sqrt(),
            -(pooled[0] - pooled[1]).square().mean((1, 2, 3)).sqrt(),
        ],
        dim=1,
    )
