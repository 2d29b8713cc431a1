"""Is a weight's change of low rank, as a merged LoRA leaves it, under the noise that rounding adds?"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(base: Tensor, tensor: Tensor, exact: bool = True) -> int | None:
    """Rank of tensor - base as a matrix (out, rest), if it is at most a quarter of the full one.

    Args:
        exact: `base` is what training started from, and not a rounded copy of it.

    What rounding leaves does not count: entries off by up to half a unit in the last place, uniform, of standard
    deviation ulp / sqrt(12). The norm of a matrix of such entries is about its largest row norm plus its largest
    column norm (Bandeira & van Handel 2016); singular values count above 1.5 times that. The rest must be no more
    than rounding has in sum, and less than what counts: else a change of full rank hides in it.
    """
    if tensor.ndim < 2:
        return None
    change = (tensor.double() - base.double()).flatten(1)
    limit = min(change.shape) // 4
    if not limit:
        return None
    noise = _ulp(tensor)
    if not exact:
        noise = torch.hypot(noise, _ulp(base))
    noise = noise.flatten(1) / 12**0.5
    floor = 1.5 * float(noise.norm(dim=1).max() + noise.norm(dim=0).max())
    floor = max(floor, 1e-6 * float(change.norm()))
    # No part of a matrix has a higher rank than the whole: a small part that has is enough.
    side = limit + limit // 2 + 1
    part = change[_spread(change.shape[0], side)][:, _spread(change.shape[1], side)]
    if int((torch.linalg.svdvals(part) > floor).sum()) > limit:
        return None
    square = change @ change.T if change.shape[0] <= change.shape[1] else change.T @ change
    energy = torch.linalg.eigvalsh(square).clamp_min(0)
    counts = energy > floor**2
    rank, told, rest = int(counts.sum()), float(energy[counts].sum()), float(energy[~counts].sum())
    # As sums of that many squares scatter, three standard deviations and more.
    allowed = float(noise.square().sum(dtype=torch.float64)) * (1.25 + 3 / noise.numel() ** 0.5)
    if not 0 < rank <= limit or rest > max(allowed, 1e-12 * told) or rest > told:
        return None
    return rank


def _ulp(tensor: Tensor) -> Tensor:
    """Units in the last place of the values, in the coarsest precision that holds them all exactly."""
    halves = (torch.bfloat16, torch.float16)
    fits = (kind for kind in halves if torch.equal(tensor.to(kind).float(), tensor.float()))
    kind = torch.finfo(next(fits, tensor.dtype))
    _, exponent = torch.frexp(tensor.float().abs().clamp_min(kind.smallest_normal))
    return torch.ldexp(torch.full_like(exponent, kind.eps, dtype=torch.float32), exponent - 1)


def _spread(count: int, wanted: int) -> Tensor:
    """Up to `wanted` indices, evenly over `count`."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()
