"""The fixed noise under which pictures and models are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import InputError

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


@dataclass(frozen=True)
class Pairs:
    """K fixed (t, eps) pairs: t stratified over the schedule, eps from the seed.

    Nothing about them is chosen on the pictures that are judged.
    """

    t: Tensor
    eps: Tensor
    seed: int

    @classmethod
    def draw(cls, denoiser: Denoiser, count: int, seed: int = 0) -> Pairs:
        if count < 2:
            raise InputError(f"--pairs {count}: at least 2 noise draws a picture are needed")
        steps = denoiser.schedule.config.num_train_timesteps
        t = ((torch.arange(count) + 0.5) * steps / count).long()
        generator = torch.Generator().manual_seed(seed)
        return cls(t, torch.randn((count, *denoiser.latent_shape), generator=generator), seed)

    def __len__(self) -> int:
        return len(self.t)

    @torch.no_grad()
    def errors(
        self, denoiser: Denoiser, features: Features, rows: Tensor, *,
        conditioning: Callable[[Tensor], Tensor] | None = None, size: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean squared error (n, K) of pictures `rows` of `features` under each pair, on the CPU.

        Args:
            conditioning: of some rows (m,) to (m, L, D); the features' own by default.
            size: pictures in one pass; what fits by default.
        """
        pairs, parts = len(self), []
        size = size or max(1, denoiser.unet_batch // pairs)
        for start in range(0, len(rows), size):
            some = rows[start : start + size].to(denoiser.device)
            error = denoiser.errors(
                features.latents[some].repeat_interleave(pairs, 0),
                self.t.repeat(len(some)).to(denoiser.device),
                self.eps.repeat(len(some), 1, 1, 1).to(denoiser.device),
                (conditioning or features.conditioning)(some).repeat_interleave(pairs, 0),
            )
            parts.append(error.mean(dim=(1, 2, 3)).view(len(some), pairs).cpu())
        return torch.cat(parts)
