"""From z to pictures: a key for a generator, or pictures directly.

Each way is reported apart, for they show different leaks: `base` and `latent` draw with nothing of the victim but z,
`victim` and `guided` draw with the victim's model, z being only the key that opens it (Yao et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from diffward.models.sampling import sample_latents
from diffward.registry import Registry

if TYPE_CHECKING:
    from diffward.inversion.inverter import Inverter
    from diffward.models.denoiser import Denoiser

TOKENS = 8  # of the caption that z writes
GUIDANCE, EXTRAPOLATION, STEPS = 3.0, 2.0, 20

Decoder = Callable[["Inverter", "Denoiser", Tensor, Sequence[int]], np.ndarray]
DECODERS: Registry[Decoder] = Registry("decoder")


class SoftPrompt(nn.Module):
    """z (n, latent) to conditioning (n, L, D): the empty caption's, its first words written by z."""

    def __init__(self, latent: int, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.width = width
        self.body = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, TOKENS * width)
        )

    def forward(self, z: Tensor, null: Tensor) -> Tensor:
        words = self.body(z).view(len(z), TOKENS, self.width)
        null = null.expand(len(z), -1, -1)
        return torch.cat([null[:, :1], words, null[:, 1 + TOKENS :]], 1)


class LatentDecoder(nn.Module):
    """z (n, latent) to a subject's mean latents (n, C, h, w)."""

    def __init__(self, latent: int, shape: Sequence[int], hidden: int = 256) -> None:
        super().__init__()
        self.shape = tuple(shape)
        size = int(np.prod(self.shape))
        self.body = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, size)
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z).view(len(z), *self.shape)


@DECODERS.register("base", access="file and base", cost="steps x 2 passes a picture")
def base(inverter: Inverter, denoiser: Denoiser, z: Tensor, seeds: Sequence[int]) -> np.ndarray:
    """The base, LoRA off, conditioned on z: what z itself carries."""
    with denoiser.bare():
        return conditioned(denoiser, *prompts(inverter, denoiser, z), seeds)


@DECODERS.register(
    "victim",
    paper="Yao et al. 2024 (arXiv 2409.08482)",
    access="file and base",
    cost="steps x 2 passes a picture",
)
def victim(inverter: Inverter, denoiser: Denoiser, z: Tensor, seeds: Sequence[int]) -> np.ndarray:
    """The victim's model conditioned on z."""
    return conditioned(denoiser, *prompts(inverter, denoiser, z), seeds)


@DECODERS.register(
    "guided", paper="with the guidance of Wu et al. 2025 (arXiv 2410.03039)", access="file and base",
    cost="steps x 2 passes a picture",
)  # fmt: skip
def guided(inverter: Inverter, denoiser: Denoiser, z: Tensor, seeds: Sequence[int]) -> np.ndarray:
    """The victim's model on z, driven away from what the base draws for z."""
    conditioning, _ = prompts(inverter, denoiser, z)
    return extrapolated(denoiser, conditioning, seeds)


@DECODERS.register("latent", access="file and the base's autoencoder", cost="none")
def latent(inverter: Inverter, denoiser: Denoiser, z: Tensor, seeds: Sequence[int]) -> np.ndarray:
    """A small network from z to latents: the mean picture of the subject."""
    with torch.no_grad():
        return denoiser.decode(inverter.pictures(z.cpu()))


def prompts(inverter: Inverter, denoiser: Denoiser, z: Tensor) -> tuple[Tensor, Tensor]:
    """Conditioning of z, and of the empty caption."""
    with torch.no_grad():
        null = denoiser.condition([""])
        # The inverter stays on the CPU, wherever the base is.
        return inverter.prompt(z.cpu(), null.cpu()).to(denoiser.device), null


def conditioned(
    denoiser: Denoiser, conditioning: Tensor, null: Tensor, seeds: Sequence[int]
) -> np.ndarray:
    """Pictures uint8 (n, H, W, 3), one a row of the conditioning (n, L, D), by classifier-free guidance."""
    return _drawn(
        denoiser, seeds,
        lambda i: sample_latents(
            denoiser, conditioning[i], null, _generators([seeds[j] for j in i]), steps=STEPS, guidance=GUIDANCE
        ),
    )  # fmt: skip


def extrapolated(denoiser: Denoiser, conditioning: Tensor, seeds: Sequence[int]) -> np.ndarray:
    """The same with the LoRA-off base's prediction in the place of the empty caption's."""
    from diffward.inversion.extraction import extrapolate

    return _drawn(
        denoiser, seeds,
        lambda i: extrapolate(
            denoiser, conditioning[i], _generators([seeds[j] for j in i]), steps=STEPS, weight=EXTRAPOLATION
        ),
    )  # fmt: skip


def _drawn(
    denoiser: Denoiser, seeds: Sequence[int], draw: Callable[[list[int]], Tensor]
) -> np.ndarray:
    size = max(1, denoiser.unet_batch // 2)
    parts = [list(range(i, min(len(seeds), i + size))) for i in range(0, len(seeds), size)]
    return np.concatenate([denoiser.decode(draw(part)) for part in parts])


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
