"""From scores to a mask: which tensors an exact budget freezes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffward.errors import InputError

UNITS = ("tensors", "parameters", "cost")


def choose(scores: Tensor, costs: Sequence[float] | Tensor, share: float) -> Tensor:
    """Which tensors to freeze: down the ranking, each one that still fits into `share` of all costs.

    With equal costs these are the round(share N) highest scores, the best set there is. With unequal ones
    it is the set that a ranking means: no tensor left out could be added, and none was passed over for a
    lower one while it fitted.

    Args:
        scores: (N,), higher = rather frozen; ties go to the earlier tensor.
        costs: (N,), above 0: ones, parameters, or what training it costs.
        share: of the total cost, in (0, 1).

    Returns:
        bool (N,).

    Raises:
        InputError: a share outside (0, 1), or one that freezes nothing or everything.
    """
    if not 0 < share < 1:
        raise InputError(f"--budget {share:g}: give a share above 0 and below 1 (0.3 is 30 %)")
    costs = torch.as_tensor(costs, dtype=torch.float64)
    scores = torch.as_tensor(scores, dtype=torch.float64)
    if not torch.isfinite(scores).all():
        raise InputError(f"scores of {int((~torch.isfinite(scores)).sum())} tensors are not finite")
    equal = bool((costs == costs[0]).all())
    room = float(round(share * len(costs)) * costs[0] if equal else share * costs.sum())
    frozen = torch.zeros(len(costs), dtype=torch.bool)
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
        cost = float(costs[i])
        if cost <= room + 1e-9:
            frozen[i], room = True, room - cost
    if not frozen.any() or frozen.all():
        what = "no tensor" if not frozen.any() else "every tensor"
        raise InputError(f"--budget {share:g}: would freeze {what} of {len(costs)}")
    return frozen


def share_of(frozen: Tensor, costs: Sequence[float] | Tensor) -> float:
    """Part of the total cost (N,) that `frozen` (N,) holds."""
    costs = torch.as_tensor(costs, dtype=torch.float64)
    return float(costs[frozen].sum() / costs.sum())
