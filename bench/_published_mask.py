"""FreezeAsGuard's published way of learning a mask, for comparison: two backwards, pictures encoded in every step.

Written from the description of it (research/freezeasguard.md, sections 1 and 4), fp32, its settings. Where the
description leaves a choice, the cheaper one is taken: pictures wait decoded and resized in memory, no
losses are gathered or logged, gradients are freed as soon as a step is made.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from diffward.models.denoiser import Denoiser

TEMPERATURE, RATIO, SPARSITY = 0.2, 0.2, 5e3
MASK_LR, USER_LR = 10.0, 1e-5
USER_INTERVAL = 5  # counts the mask step: 1 and 4 of the user
_Scope = Callable[[], contextlib.AbstractContextManager[object]]


class PublishedMask:
    """The loop over one UNet. Weights kept: theta (in the UNet), d = theta_pre - theta_ft, all gradients.

    Args:
        denoiser: its UNet holds theta_pre and is changed.
        pixels: uint8 (n, H, W, 3), of both domains, mixed.
        illegal: bool (n,), which pictures are of the forbidden domain.
        tuned: theta_ft by parameter name.
        updating: entered around what is done to the weights outside forward and backward.
    """

    def __init__(
        self, denoiser: Denoiser, pixels: np.ndarray, captions: list[str], illegal: Tensor,
        tuned: Mapping[str, Tensor], *, batch: int = 16, seed: int = 0,
        updating: _Scope = contextlib.nullcontext,
    ) -> None:  # fmt: skip
        self.denoiser, self.unet, self.updating = denoiser, denoiser.unet, updating
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.captions, self.flags, self.batch = captions, illegal.float(), batch
        self.random = torch.Generator().manual_seed(seed)
        self.unet.requires_grad_(True).train()
        self.unet.enable_gradient_checkpointing()
        with torch.no_grad():
            own = dict(self.unet.named_parameters())
            self.d = [p - tuned[name] for name, p in own.items()]
            self.x = torch.rand(len(own), generator=self.random).requires_grad_(True)
            mask = torch.sigmoid(self.x / TEMPERATURE)
            for i, (name, p) in enumerate(own.items()):
                p.copy_(tuned[name] + mask[i] * self.d[i])

    def __call__(self) -> None:
        """An update of the mask: its step, then those of the user."""
        self.mask_step()
        for _ in range(USER_INTERVAL - 1):
            self.user_step()

    def errors(self) -> tuple[Tensor, Tensor]:
        """Mean squared error (B,) of a fresh batch, encoded here and now, and its domain flags (B,)."""
        base, g = self.denoiser, self.random
        rows = torch.randperm(len(self.captions), generator=g)[: self.batch]
        pixels = self.pixels[rows]
        flip = torch.rand(len(rows), generator=g) < 0.5
        pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(3), pixels)
        with torch.no_grad():
            latents = base.vae.encode(pixels).latent_dist.sample() * base.vae.config.scaling_factor
            text = base.text_encoder(base.tokenize([self.captions[i] for i in rows.tolist()]))
        eps = torch.randn(latents.shape, generator=g)
        t = torch.randint(base.schedule.config.num_train_timesteps, (len(rows),), generator=g)
        noisy = base.schedule.add_noise(latents, eps, t)
        predicted = self.unet(noisy, t, text.last_hidden_state).sample
        wanted = base.target(latents, t, eps)
        return ((predicted - wanted) ** 2).mean(dim=(1, 2, 3)), self.flags[rows]

    def mask_step(self) -> None:
        """x_i -= eta <d_i, g_i> m_i (1 - m_i) / T + c d/dx_i (mean m - rho)^2; theta += d (m_new - m_old)."""
        each, flag = self.errors()
        illegal = (each * flag).sum() / (flag.sum() + 1e-5)
        innocent = (each * (1 - flag)).sum() / (len(flag) - flag.sum() + 1e-5)
        ((innocent - illegal) / 2).backward()
        with self.updating():
            penalty = SPARSITY * (torch.sigmoid(self.x / TEMPERATURE).mean() - RATIO) ** 2
            (sparse,) = torch.autograd.grad(penalty, self.x)
            for i, p in enumerate(self.unet.parameters()):
                assert p.grad is not None
                before = torch.sigmoid(self.x[i] / TEMPERATURE)  # autograd follows each index
                kept = copy.deepcopy(before.detach())
                slope = kept * (1 - kept) / TEMPERATURE
                inner = (self.d[i] * p.grad).sum()
                self.x.data[i] -= MASK_LR * inner * slope + sparse[i]
                after = torch.sigmoid(self.x[i] / TEMPERATURE)
                p.data += self.d[i] * (after.detach() - kept)
        self.unet.zero_grad(set_to_none=True)

    def user_step(self) -> None:
        """D = -eta (1 - m) g; theta += (1 - m) D; d -= D (plain SGD; eqs. 9, 10, 12)."""
        each, _ = self.errors()
        each.mean().backward()
        with self.updating():
            for i, p in enumerate(self.unet.parameters()):
                assert p.grad is not None
                free = 1 - torch.sigmoid(self.x[i] / TEMPERATURE).detach()
                change = -USER_LR * free * p.grad
                p.data += free * change
                self.d[i] -= change
        self.unet.zero_grad(set_to_none=True)
