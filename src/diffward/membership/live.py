"""What a live bank needs beside the latents: texts, crops and factors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffward.data import FeatureCache, cache_root
from diffward.membership.probe import ON

if TYPE_CHECKING:
    from diffward.data import Pictures
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser


class Conditions:
    """Conditioning of every picture under a named condition, by model, computed once.

    "caption"; "null", the empty caption; "reduced0" …, the caption without its most telling words
    (`membership.captions`).
    """

    def __init__(self, denoiser: Denoiser, captions: Sequence[str]) -> None:
        self._denoiser, self._captions = denoiser, list(captions)
        self._ready: dict[tuple[str, str], Tensor] = {}

    def of(self, name: str, model: str) -> Tensor:
        """(N, L, D) on the denoiser's device."""
        if not self._denoiser.adapts_text:
            model = "either"
        if (name, model) not in self._ready:
            texts = self.captions(name)
            distinct = list(dict.fromkeys(texts))
            place = {caption: row for row, caption in enumerate(distinct)}
            rows = torch.tensor([place[c] for c in texts], device=self._denoiser.device)
            # The bank has switched the adapter to what is asked for.
            self._ready[name, model] = self._denoiser.condition(distinct)[rows]
        return self._ready[name, model]

    def captions(self, name: str) -> list[str]:
        if name == "caption":
            return self._captions
        if name == "null":
            return [""] * len(self._captions)
        return self._reduced[int(name.removeprefix("reduced"))]

    @cached_property
    def _reduced(self) -> list[list[str]]:
        """By share, computed once: ranking the words encodes each caption once a word."""
        from diffward.membership.captions import reduced_captions

        return reduced_captions(self._denoiser, self._captions)


class Crops:
    """Latents of centre crops, resized back; cached like the pictures' own."""

    def __init__(self, denoiser: Denoiser, pictures: Pictures, keep: bool) -> None:
        self._denoiser, self._pictures, self._keep = denoiser, pictures, keep
        self._ready: dict[float, Tensor] = {}

    def of(self, share: float) -> Tensor:
        """(N, C, h, w) on the CPU, for a crop of `share` of the side."""
        if share not in self._ready:
            side = self._denoiser.resolution

            def compute(indices: list[int]) -> Tensor:
                pixels = [centre_crop(self._pictures[i].load(side), share) for i in indices]
                return self._denoiser.encode(np.stack(pixels))

            root = cache_root() / "features" if self._keep else None
            store = FeatureCache(root, f"crop-{share:.4f}-{self._denoiser.identity}-{side}")
            self._ready[share] = store.get_or_compute(
                self._pictures.hashes, compute, max(8, self._denoiser.vae_batch)
            )
        return self._ready[share]


def centre_crop(pixels: np.ndarray, share: float) -> np.ndarray:
    """The middle `share` of a picture, uint8 (H, W, 3), at its former size (bicubic)."""
    from PIL import Image

    height, width = pixels.shape[:2]
    dx, dy = width * (1 - share) / 2, height * (1 - share) / 2
    image = Image.fromarray(pixels)
    box = (dx, dy, width - dx, height - dy)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def fresh_factors(
    denoiser: Denoiser, weights: LoraWeights | None, model: str, seed: int
) -> LoraWeights:
    """Factors along which a white-box probe takes gradients.

    With the adapter on, its own. Of the base they must tell nothing of the training pictures: random
    ones of the same shapes and size.
    """
    from diffward.membership.factors import own_factors, random_factors

    if weights is None:
        raise RuntimeError("this probe needs the adapter's weights")
    own = own_factors(weights.resolve(denoiser.module_shapes()))
    return own if model == ON else random_factors(own, seed)


def factor_shapes(weights: LoraWeights | None) -> str:
    """Short hash of what fresh factors depend on: names, shapes and scales, not values."""
    if weights is None:
        return "none"
    told = [
        f"{name}{module.rank}{module.scale}{[tuple(t.shape) for t in module.tensors.values()]}"
        for name, module in sorted(weights.modules.items())
    ]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:16]


def picture_key(picture: str, caption: str) -> str:
    """Names a picture under a caption in the cache."""
    return hashlib.sha256(f"{picture}\0{caption}".encode()).hexdigest()
