"""What follows from the noise schedule: epsilon and z_0 of a prediction, DDIM steps.

z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps and v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0
(Salimans & Ho 2022, arXiv 2202.00512, appendix D). `t` is (n,); tensors are (n, C, h, w).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


def levels(denoiser: Denoiser, t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), shaped (n, 1, 1, 1), on the device of t."""
    abar = denoiser.alphas_cumprod.to(t.device)[t].float().view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def moment(denoiser: Denoiser, t: int, like: Tensor) -> Tensor:
    """(n,) of the timestep that is t on a schedule of 1,000, as the papers give it."""
    steps = denoiser.schedule.config.num_train_timesteps
    return torch.full((len(like),), round(t * steps / 1000), device=like.device)


def eps_of(denoiser: Denoiser, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """The noise that the model sees in z_t."""
    if denoiser.prediction_type == "epsilon":
        return prediction
    signal, sigma = levels(denoiser, t)
    return signal * prediction + sigma * noisy


def x0_of(denoiser: Denoiser, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """The clean latent that the model sees in z_t."""
    signal, sigma = levels(denoiser, t)
    if denoiser.prediction_type == "epsilon":
        return (noisy - sigma * prediction) / signal
    return signal * noisy - sigma * prediction


def ddim_step(
    denoiser: Denoiser, prediction: Tensor, noisy: Tensor, t: Tensor, target: Tensor
) -> Tensor:
    """z at `target`, later or earlier than t, by the deterministic DDIM rule.

    Song et al. 2021 (arXiv 2010.02502), eq. 12 with sigma = 0; towards more noise it is the same rule.
    """
    signal, sigma = levels(denoiser, target)
    x0 = x0_of(denoiser, prediction, noisy, t)
    return signal * x0 + sigma * eps_of(denoiser, prediction, noisy, t)
