"""Pictures and captions as a base sees them, encoded once and cached."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffward.data import FeatureCache, Pictures, cache_root

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


@dataclass
class Features:
    """Latents (n, C, h, w) and captions of n pictures; conditioning by caption.

    `conditioning(indices)` is what the frozen text encoder says of the captions of these pictures.
    """

    latents: Tensor
    captions: list[str]
    names: list[str]
    _embeddings: Tensor
    _caption_index: Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def conditioning(self, indices: Tensor) -> Tensor:
        return self._embeddings[self._caption_index[indices]]

    def of(self, rows: Sequence[int]) -> Features:
        """Those of some pictures."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.latents.device)
        return Features(
            self.latents[index], [self.captions[i] for i in rows], [self.names[i] for i in rows],
            self._embeddings, self._caption_index[index],
        )  # fmt: skip

    def join(self, other: Features) -> Features:
        """These pictures, then the others'."""
        return Features(
            torch.cat([self.latents, other.latents]), self.captions + other.captions, self.names + other.names,
            torch.cat([self._embeddings, other._embeddings]),
            torch.cat([self._caption_index, other._caption_index + len(self._embeddings)]),
        )  # fmt: skip

    def digest(self, more: str = "") -> str:
        """Hash of latents and captions, and of `more`."""
        data = hashlib.sha256(self.latents.float().cpu().numpy().tobytes())
        data.update("\0".join(self.captions).encode())
        data.update(more.encode())
        return data.hexdigest()


def encode_pictures(
    denoiser: Denoiser,
    pictures: Pictures,
    *,
    cache: bool = True,
    batch: int = 32,
    flip: bool = False,
) -> Features:
    """Encode pictures and captions with a base, or take them from the cache on disk.

    Keys are the picture's hash, the base's identity and the size; names never reach the cache.
    With `flip` the mirrored pictures follow the upright ones.
    """
    root = cache_root() / "features" if cache else None
    where = f"{denoiser.identity}-{denoiser.resolution}"

    def latents(mirrored: bool) -> Tensor:
        def compute(indices: list[int]) -> Tensor:
            pixels = np.stack([pictures[i].load(denoiser.resolution) for i in indices])
            return denoiser.encode(pixels[:, :, ::-1] if mirrored else pixels)

        store = FeatureCache(root, f"latents-{where}{'-mirrored' if mirrored else ''}")
        return store.get_or_compute(pictures.hashes, compute, max(8, denoiser.vae_batch))

    encoded = torch.cat([latents(False), latents(True)]) if flip else latents(False)
    captions = pictures.captions * (2 if flip else 1)
    names = [p.name or p.path.name for p in pictures] * (2 if flip else 1)
    embeddings, index = encode_captions(denoiser, captions, cache=cache)
    return Features(encoded.to(denoiser.device), captions, names, embeddings, index)


def encode_captions(
    denoiser: Denoiser, captions: list[str], *, cache: bool = True
) -> tuple[Tensor, Tensor]:
    """Embeddings (m, L, D) of the distinct captions, and the row (n,) of each caption."""
    distinct = list(dict.fromkeys(captions))
    rows = {caption: row for row, caption in enumerate(distinct)}
    where = f"text-{denoiser.identity}-{denoiser.compute_dtype}"
    store = FeatureCache(cache_root() / "features" if cache else None, where)
    keys = [hashlib.sha256(c.encode()).hexdigest() for c in distinct]

    def compute(indices: list[int]) -> Tensor:
        with denoiser.adapter(False) if denoiser.adapts_text else contextlib.nullcontext():
            return denoiser.condition([distinct[i] for i in indices])

    embeddings = store.get_or_compute(keys, compute, 64)
    index = torch.tensor([rows[c] for c in captions], device=denoiser.device)
    return embeddings.to(denoiser.device), index
