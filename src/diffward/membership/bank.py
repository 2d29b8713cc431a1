"""The score bank: one cached tensor of errors that every loss-like attack is arithmetic on.

errors[model, condition, picture, pair]: mean squared error of the denoiser on one picture noised
with one fixed (t, eps), adapter on or off. The same pairs serve every picture and both models
(common random numbers), so that differences are not noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffward.data import FeatureCache, cache_root
from diffward.errors import InputError
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

ON, OFF = "on", "off"


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


@dataclass(frozen=True)
class Bank:
    """errors (M, C, N, K) float64; `models` and `conditions` name the first two axes."""

    errors: np.ndarray
    models: tuple[str, ...]
    conditions: tuple[str, ...]
    timesteps: np.ndarray
    evaluations: int = 0

    def of(self, model: str, condition: str = "caption") -> np.ndarray:
        """Errors (N, K) of one model under one condition."""
        return self.errors[self.models.index(model), self.conditions.index(condition)]

    def as_base(self) -> Bank:
        """The bank of an audit of the base by itself: a control that must come out at chance.

        Even pairs play the adapter, odd pairs the base, so that a difference of the two is a real
        measurement and not zero by construction.
        """
        base = self.errors[self.models.index(OFF)]
        even, odd = base[..., 0::2], base[..., 1::2]
        size = min(even.shape[-1], odd.shape[-1])
        errors = np.stack([even[..., :size], odd[..., :size]])
        return Bank(errors, (ON, OFF), self.conditions, self.timesteps[0::2][:size])


def build_bank(
    denoiser: Denoiser,
    features: Features,
    hashes: Sequence[str],
    pairs: Pairs,
    *,
    adapter_id: str | None = None,
    batch: int | None = None,
) -> Bank:
    """Errors of every picture under its caption, adapter on and off.

    Args:
        hashes: of the pictures, in the order of `features`.
        adapter_id: hash of the adapter's file: errors are then cached on disk, so that an
            interrupted audit goes on and the base's errors serve every LoRA. None keeps nothing.
        batch: denoiser inputs in one forward pass; what fits the size by default.

    Raises:
        InputError: errors are not finite (a broken adapter).
    """
    before = denoiser.evaluations
    batch = batch or denoiser.unet_batch
    keys = [_key(h, c) for h, c in zip(hashes, features.captions, strict=True)]
    pair_id = f"{denoiser.unet_identity}-{denoiser.resolution}-{len(pairs)}-{pairs.seed}-{denoiser.compute_dtype}"
    on_text = None
    if denoiser.adapts_text:
        with denoiser.adapter(True):
            on_text = denoiser.condition(features.captions)
    chunk = max(1, batch // len(pairs))
    tables = []
    with progress("score", 2 * len(keys)) as bar:
        for model in (ON, OFF):
            who = adapter_id if model == ON else "base"
            root = cache_root() / "scores" if adapter_id is not None else None
            store = FeatureCache(root, f"{pair_id}-{who}".replace("torch.", ""))
            text = on_text if model == ON else None
            compute = _computer(denoiser, features, pairs, text, model == ON, batch, bar.advance)
            tables.append(store.get_or_compute(keys, compute, max(chunk, 16)))
    errors = torch.stack(tables)[:, None].double().numpy()
    if not np.isfinite(errors).all():
        raise InputError(
            "the model's errors are not finite with this adapter: the file is broken, or for another base"
        )
    return Bank(errors, (ON, OFF), ("caption",), pairs.t.numpy(), denoiser.evaluations - before)


def _computer(
    denoiser: Denoiser, features: Features, pairs: Pairs, text: Tensor | None, on: bool, batch: int,
    advance: Callable[..., None],
) -> Callable[[list[int]], Tensor]:  # fmt: skip
    """Errors (n, K) of pictures by index, float32: forward passes of `batch` (picture, pair)s."""
    device = denoiser.device
    t_all, eps_all = pairs.t.to(device), pairs.eps.to(device)

    @torch.no_grad()
    def compute(indices: list[int]) -> Tensor:
        rows = torch.tensor(indices, device=device)
        picture = rows.repeat_interleave(len(pairs))
        pair = torch.arange(len(pairs), device=device).repeat(len(rows))
        found = []
        with denoiser.adapter(on):
            for start in range(0, len(picture), batch):
                p, k = picture[start : start + batch], pair[start : start + batch]
                conditioning = features.conditioning(p) if text is None else text[p]
                errors = denoiser.errors(features.latents[p], t_all[k], eps_all[k], conditioning)
                found.append(errors.mean(dim=(1, 2, 3)))
        advance(by=len(indices))
        return torch.cat(found).view(len(rows), len(pairs)).cpu()

    return compute


def _key(picture: str, caption: str) -> str:
    return hashlib.sha256(f"{picture}\0{caption}".encode()).hexdigest()
