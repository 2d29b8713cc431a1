"""The canonical form of a module's change: what does not depend on how it was factored, scaled or stored.

W = (alpha/r) B A is the same for (B M, M^-1 A) and any other split of the scale. Its singular value decomposition
is not: QR of both factors and the SVD of an r x r matrix give it in O((out + in) r^2). What is left free is one
sign a component, fixed here by the largest entry of u.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffward.lora.module import LoraModule

_ROUNDING = 1e-4  # of the largest singular value: what is smaller is rounding
_TINY = 1e-20


@dataclass(frozen=True)
class Canonical:
    """W = u diag(sigma) v^T: u (..., out, k), sigma (..., k) descending, v (..., in, k); convolutions as (out, in kh kw).

    Columns of u and v are zero where sigma is.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor

    def top(self, count: int) -> Canonical:
        """The strongest components; padded with zeros where there are fewer."""
        from torch.nn.functional import pad

        more = max(0, count - self.sigma.shape[-1])
        return Canonical(*(pad(x[..., :count], (0, more)) for x in (self.u, self.sigma, self.v)))

    def significant(self) -> Canonical:
        """Of one module: without the components that are rounding."""
        return self.top(int((self.sigma > _ROUNDING * self.sigma[0]).sum()))

    def to(self, device: torch.device) -> Canonical:
        return Canonical(*(x.to(device) for x in (self.u, self.sigma, self.v)))

    def alignment(self, seen: Tensor) -> Tensor:
        """Does W lie where a gradient G descends? cos(-G V V^T, W) (...,), from seen = G V (..., out, k).

        From B = 0 the first change of W = B A under G is proportional to G A^T A, for a random A to G V V^T. With
        W = U S V^T, <-G V V^T, W> = <-G V, U S> and ||G V V^T|| = ||G V||.
        """
        length = (seen.square().sum((-2, -1)) + _TINY).sqrt() * self.sigma.norm()
        return -(seen * self.u * self.sigma).sum((-2, -1)) / length

    def delta(self) -> Tensor:
        """W (..., out, in)."""
        return (self.u * self.sigma.unsqueeze(-2)) @ self.v.mT


def canonical_module(
    module: LoraModule, base_weight: Tensor | None = None, most: int | None = None
) -> Canonical:
    """The canonical form of a module of any kind; LoHa, LoKr and DoRA are materialised.

    Args:
        base_weight: needed by DoRA.
        most: components at most; all that are there by default (the rank of a LoRA).

    Raises:
        InputError: DoRA without its base weight.
    """
    tensors = module.tensors
    if tensors.keys() == {"down", "up"}:
        found = canonical_factors(
            tensors["down"].flatten(1), tensors["up"].flatten(1), module.scale
        )
    else:
        found = canonical_matrix(module.delta(base_weight).flatten(1))
    return found if most is None else found.top(most)


def canonical_factors(down: Tensor, up: Tensor, scale: float | Tensor = 1.0) -> Canonical:
    """Of scale * up @ down, for down (..., r, in) and up (..., out, r); scale a number or (...,).

    Computed in double precision, given in single.
    """
    import torch

    left, left_r = torch.linalg.qr(up.double())
    right, right_r = torch.linalg.qr(down.double().mT)
    scale = torch.as_tensor(scale, dtype=torch.float64, device=up.device)
    inner = left_r @ right_r.mT * scale[..., None, None]
    u, sigma, vh = torch.linalg.svd(inner, full_matrices=False)
    return _signed(left @ u, sigma, right @ vh.mT)


def canonical_matrix(delta: Tensor) -> Canonical:
    """Of a change (..., out, in) that is not factored."""
    import torch

    u, sigma, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return _signed(u, sigma, vh.mT)


def _signed(u: Tensor, sigma: Tensor, v: Tensor) -> Canonical:
    """The largest entry of each column of u is positive; of those as large, up to rounding, the first."""
    size = u.abs()
    as_large = size >= size.amax(dim=-2, keepdim=True) * (1 - 1e-6)
    largest = u.gather(-2, as_large.byte().argmax(dim=-2, keepdim=True))
    sign = largest.sign().masked_fill(largest == 0, 1)
    # Where there is no change its directions are whatever the rounding gave.
    sign = sign * (sigma > 1e-10 * sigma.amax(dim=-1, keepdim=True)).unsqueeze(-2)
    return Canonical((u * sign).float(), sigma.float(), (v * sign).float())
