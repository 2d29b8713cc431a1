"""Plain fine-tuning: the noise-prediction loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffward.finetune.method import METHODS, Batch, Method

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


@METHODS.register(
    "plain",
    paper="Ho et al. 2020; LoRA: Hu et al. 2022",
    access="-",
    cost="1 forward and backward a step",
)
class Plain(Method):
    """Plain fine-tuning, no protection: L = ||prediction - target||^2, averaged over a latent."""

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        return denoiser.errors(batch.latents, batch.t, batch.eps, batch.conditioning).mean(
            dim=(1, 2, 3)
        )
