"""Drawing pictures with a base, adapter on or off: classifier-free guidance, one seed a picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 5.0,
    batch: int | None = None,
) -> np.ndarray:
    """Draw one picture a caption: uint8 (n, H, W, 3).

    Picture i depends on (seed, i, caption) alone, not on the batch or on the other captions.
    """
    pictures = []
    batch = batch or max(1, denoiser.unet_batch // 4)
    null = denoiser.condition([""])
    for start in range(0, len(captions), batch):
        texts = list(captions[start : start + batch])
        conditioning = torch.cat([null.expand(len(texts), -1, -1), denoiser.condition(texts)])
        generators = [_generator(seed, start + i) for i in range(len(texts))]
        latents = torch.stack([torch.randn(denoiser.latent_shape, generator=g) for g in generators])
        scheduler = type(denoiser.sampler).from_config(denoiser.sampler.config)
        scheduler.set_timesteps(steps, device=denoiser.device)
        latents = latents.to(denoiser.device) * scheduler.init_noise_sigma
        # Schedulers that add noise on the way would draw it from the global generator.
        own = (
            {"generator": generators}
            if "generator" in inspect.signature(scheduler.step).parameters
            else {}
        )
        for t in scheduler.timesteps:
            double = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            times = t.to(denoiser.device).expand(len(double))
            without, with_text = denoiser.predict(double, times, conditioning).chunk(2)
            guided = without + guidance * (with_text - without)
            latents = scheduler.step(guided, t, latents, **own).prev_sample
        pictures.append(denoiser.decode(latents))
    return np.concatenate(pictures)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
