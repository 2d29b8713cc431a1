"""What a probe is: one way of asking a model about pictures. Attacks are arithmetic on the answers.

Probes hold all denoiser evaluations, so that attacks which ask the same share the answer, and so
that every answer is batched and cached in one place (`bank`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffward.membership.layout import Layout
from diffward.registry import Registry

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.pairs import Pairs

ON, OFF = "on", "off"
BASE_CAPTION = (
    "base caption"  # the caption as the base's text encoder has it, whatever an adapter makes of it
)


@dataclass
class Query:
    """A few pictures put to one model. The adapter is already on or off, gradients are disabled.

    Attributes:
        latents: (n, C, h, w), on the denoiser's device.
        rows: (n,) which pictures these are, for what must be drawn by picture.
        text: condition name ("caption", `BASE_CAPTION`, "null", "reduced0" …) to conditioning (n, L, D).
        crops: share of the side to latents (n, C, h, w) of the centre crop, resized back.
        pairs: the K shared (t, eps) pairs.
        factors: of a white-box probe: the LoRA's weights, or the factors of a full model's change; of
            the base fresh ones of the same shapes.
        batch: how many denoiser inputs fit one pass.
        model: `ON` or `OFF`.
        kept: what a probe works out once of the model's factors, for the next queries.
    """

    denoiser: Denoiser
    latents: Tensor
    rows: Tensor
    text: Callable[[str], Tensor]
    crops: Callable[[float], Tensor]
    pairs: Pairs
    factors: Callable[[], LoraWeights]
    batch: int
    model: str = ON
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return Layout.of_pairs(self.pairs)

    def predict(self, noisy: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """`Denoiser.predict` in passes of at most `batch`."""
        parts = [
            self.denoiser.predict(noisy[i:j], t[i:j], conditioning[i:j])
            for i, j in self._spans(len(noisy))
        ]
        return torch.cat(parts)

    def errors(self, latents: Tensor, t: Tensor, eps: Tensor, conditioning: Tensor) -> Tensor:
        """Mean squared error (m,) of each sample, in passes of at most `batch`."""
        parts = [
            self.denoiser.errors(latents[i:j], t[i:j], eps[i:j], conditioning[i:j]).mean((1, 2, 3))
            for i, j in self._spans(len(latents))
        ]
        return torch.cat(parts)

    def errors_at(self, latents: Tensor, indices: list[int], conditioning: Tensor) -> Tensor:
        """Errors (n, k) of n pictures at each of the pairs `indices`."""
        n, k = len(latents), len(indices)
        device = latents.device
        t, eps = self.pairs.t[indices].to(device), self.pairs.eps[indices].to(device)
        picture = torch.arange(n, device=device).repeat_interleave(k)
        pair = torch.arange(k, device=device).repeat(n)
        return self.errors(latents[picture], t[pair], eps[pair], conditioning[picture]).view(n, k)

    def _spans(self, size: int) -> list[tuple[int, int]]:
        return [(i, min(i + self.batch, size)) for i in range(0, size, self.batch)]


Probe = Callable[[Query], Tensor]
"""Answers (n, …), float32: one row a picture, that depends on no other picture of the query."""

PROBES: Registry[Probe] = Registry("probe")
"""Extra fields of an entry:

evaluations  function of `Layout`: denoiser evaluations a picture (a backward pass counts as two more)
width        denoiser inputs a picture in one pass, for the size of queries; `evaluations` by default
paired       the last axis runs over pairs: the base's answers can be split in two independent halves
factors      it takes gradients along factors (`Query.factors`)
"""
