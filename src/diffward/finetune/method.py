"""What a training method is, and the registry of them.

The loop draws the batch and the noise, calls `loss`, and does the rest. A method turns a batch into
one loss a sample; it never averages and never steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from diffward.registry import Registry

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


@dataclass
class Batch:
    """Latents (B, C, h, w), conditioning (B, L, D), t (B,), eps (B, C, h, w), rows (B,) of the data."""

    latents: Tensor
    conditioning: Tensor
    t: Tensor
    eps: Tensor
    rows: Tensor


class Method(Protocol):
    """One way of fine-tuning."""

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """The loss (B,) of each sample, with gradient."""
        ...


METHODS: Registry[type[Method]] = Registry("method")
