"""A UNet's own parameters: by name, set, and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def parameters_of(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a UNet under the base's names, adapters left out."""
    return {
        name.replace(".base_layer", ""): p
        for name, p in unet.named_parameters()
        if ".lora_" not in name
    }


@torch.no_grad()
def put(unet: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set some of a UNet's parameters."""
    own = parameters_of(unet)
    for name in weights:
        own[name].copy_(weights[name])


def tensor_hash(tensor: Tensor) -> str:
    """128 bits of the SHA-256 of a tensor's values as fp32, wherever and in whatever type it is kept."""
    values = tensor.detach().float().contiguous().cpu().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]


def hashes(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """Those of some of the named weights."""
    return {name: tensor_hash(weights[name]) for name in names}
