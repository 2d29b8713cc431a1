"""A denoiser whose errors are drawn from known distributions, so that each attack's AUC is known.

The conditioning carries the picture's number, so the toy knows which picture it is asked about, and
with it the clean latents: it finds the true noise exactly and adds an error of the size it was told.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffward.membership.bank import Bank, Pairs, build_bank
from diffward.models.features import Features

SHAPE = (4, 8, 8)


class ToyPictures:
    """Only what a bank asks of pictures."""

    def __init__(self, n: int) -> None:
        self.hashes = [f"{i:064x}" for i in range(n)]

    def __len__(self) -> int:
        return len(self.hashes)


class ToyDenoiser:
    """`rms[model]` (N,) or (N, T = 1000): root mean square of the error of each picture (at each t)."""

    resolution, prediction_type, compute_dtype, adapts_text = 8, "epsilon", torch.float32, False
    unet_identity = identity = "toy"
    device = torch.device("cpu")
    latent_shape, unet_batch, vae_batch = SHAPE, 64, 64

    def __init__(self, latents: Tensor, rms: dict[str, np.ndarray]) -> None:
        from diffusers import DDPMScheduler

        self.schedule = DDPMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
        )
        self.alphas_cumprod = self.schedule.alphas_cumprod
        self.latents, self.evaluations, self.on = latents, 0, True
        self.rms = {k: torch.as_tensor(np.asarray(v), dtype=torch.float32) for k, v in rms.items()}

    @contextlib.contextmanager
    def adapter(self, on: bool) -> Iterator[None]:
        before, self.on = self.on, on
        yield
        self.on = before

    def condition(self, captions: list[str]) -> Tensor:
        return torch.tensor([[[float(c or -1)]] for c in captions])

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def noise(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        signal, sigma = self._levels(t)
        return signal * latents + sigma * eps

    def target(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return eps

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        self.evaluations += len(noisy)
        rows = conditioning[:, 0, 0].long()
        signal, sigma = self._levels(t)
        eps = (noisy - signal * self.latents[rows]) / sigma
        rms = self.rms["on" if self.on else "off"][rows]
        size = rms if rms.ndim == 1 else rms.gather(1, t[:, None])[:, 0]
        # Independent across queries, as an error of a real model nearly is; exactly of the given size.
        noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(self.evaluations))
        noise = noise / (noise**2).mean((1, 2, 3), keepdim=True).sqrt()
        return eps + size.view(-1, 1, 1, 1) * noise

    def errors(self, latents: Tensor, t: Tensor, eps: Tensor, conditioning: Tensor) -> Tensor:
        return (self.predict(self.noise(latents, t, eps), t, conditioning) - eps) ** 2


def toy_bank(
    on: np.ndarray, off: np.ndarray, is_member: np.ndarray, pairs: int = 16, seed: int = 0
) -> tuple[Bank, ToyDenoiser]:
    """A live bank over N pictures whose error has the root mean square `on` and `off`, (N,) or (N, 1000)."""
    n = len(is_member)
    latents = torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(seed))
    denoiser = ToyDenoiser(latents, {"on": on, "off": off})
    captions = [str(i) for i in range(n)]
    features = Features(latents, captions, captions, denoiser.condition(captions), torch.arange(n))
    bank = build_bank(
        denoiser, features, ToyPictures(n), is_member, Pairs.draw(denoiser, pairs, seed), seed=seed
    )  # type: ignore[arg-type]
    return bank, denoiser


def binormal_auc(d: float) -> float:
    """AUC of N(d, 1) against N(0, 1)."""
    return 0.5 * (1 + math.erf(d / 2))


def shifted(
    n: int, d: float, seed: int = 0, spread: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(on, off, is_member): log rms normal, members' lower by d standard deviations with the adapter on.

    Any attack whose score is a decreasing function of the rms has AUC `binormal_auc(d)`.
    """
    rng = np.random.default_rng(seed)
    member = rng.permutation(n) < n // 2
    on = np.exp(spread * (rng.standard_normal(n) - d * member))
    off = np.exp(spread * rng.standard_normal(n))
    return on, off, member
