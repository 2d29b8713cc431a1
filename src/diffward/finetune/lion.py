"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum, for one LoRA or a stack of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffward.finetune.stacked_adamw import columns


class Lion(torch.optim.Optimizer):
    """x <- x - lr (sign(beta1 m + (1 - beta1) g) + decay x); m <- beta2 m + (1 - beta2) g.

    With lists for `lr` and `weight_decay` the parameters are stacks (K, ...), and only the first len(lr) of each
    move, as in `StackedAdamW`.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float | list[float], weight_decay: float | list[float],
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p)}
            count = len(group["lr"]) if isinstance(group["lr"], list) else None
            moving = [p[:count] if count else p for p in params]
            grads = [p.grad[:count] if count else p.grad for p in params]
            means = [self.state[p]["exp_avg"] for p in params]
            means = [m[:count] for m in means] if count else means
            rates, decays = _spread(group["lr"], moving), _spread(group["weight_decay"], moving)
            signs = torch._foreach_lerp(means, grads, 1 - beta1)
            torch._foreach_sign_(signs)
            torch._foreach_addcmul_(signs, moving, decays)
            torch._foreach_addcmul_(moving, signs, rates, -1)
            torch._foreach_lerp_(means, grads, 1 - beta2)


def _spread(value: float | list[float], like: Sequence[Tensor]) -> list[Tensor]:
    """A number, or one a LoRA, to multiply each tensor with."""
    if isinstance(value, list):
        return columns(value[: len(like[0])], like)
    return [like[0].new_tensor(value)] * len(like)
