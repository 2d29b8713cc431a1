"""Hashes of tensors' values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor


def tensor_hash(tensor: Tensor) -> str:
    """128 bits of the SHA-256 of a tensor's values as fp32, wherever and in whatever type it is kept."""
    values = tensor.detach().float().contiguous().cpu().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]


def hashes(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """Those of some of the named weights."""
    return {name: tensor_hash(weights[name]) for name in names}
