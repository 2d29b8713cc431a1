"""Drawing pictures with a base, adapter on or off: classifier-free guidance, one seed a picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

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
        generators = [_generator(seed, start + i) for i in range(len(texts))]
        latents = sample_latents(
            denoiser, denoiser.condition(texts), null, generators, steps=steps, guidance=guidance
        )
        pictures.append(denoiser.decode(latents))
    return np.concatenate(pictures)


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    conditioning: Tensor,
    null: Tensor,
    generators: Sequence[torch.Generator],
    *,
    steps: int = 20,
    guidance: float = 5.0,
    scheduler: Any = None,
) -> Tensor:
    """Draw latents (n, C, h, w) from conditioning (n, L, D), in one batch.

    Args:
        null: conditioning of the empty caption, (1, L, D) or (n, L, D).
        generators: one a picture, on the CPU: all that it depends on besides its conditioning.
        scheduler: a fresh one; of the base's own kind by default.
    """
    both = torch.cat([null.expand(len(conditioning), -1, -1), conditioning])

    def guided(noisy: Tensor, t: Tensor) -> Tensor:
        double, times = torch.cat([noisy, noisy]), torch.cat([t, t])
        without, with_text = denoiser.predict(double, times, both).chunk(2)
        return without + guidance * (with_text - without)

    return denoise(denoiser, guided, generators, steps=steps, scheduler=scheduler)


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    predict: Callable[[Tensor, Tensor], Tensor],
    generators: Sequence[torch.Generator],
    *,
    steps: int = 20,
    scheduler: Any = None,
) -> Tensor:
    """Draw latents (n, C, h, w) by any prediction: `predict(noisy (n, C, h, w), t (n,))` of the same shape.

    Args:
        generators: one a picture, as in `sample_latents`; `scheduler` too.
    """
    latents = torch.stack([torch.randn(denoiser.latent_shape, generator=g) for g in generators])
    if scheduler is None:
        scheduler = type(denoiser.sampler).from_config(denoiser.sampler.config)
    scheduler.set_timesteps(steps, device=denoiser.device)
    latents = latents.to(denoiser.device) * scheduler.init_noise_sigma
    # Schedulers that add noise on the way would draw it from the global generator.
    own = (
        {"generator": list(generators)}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for t in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, t)
        prediction = predict(noisy, t.to(denoiser.device).expand(len(noisy)))
        latents = scheduler.step(prediction, t, latents, **own).prev_sample
    return latents


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
