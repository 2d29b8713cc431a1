"""AdamW and gradient clipping for stacks of LoRAs: each one's step is its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StackedAdamW(torch.optim.Optimizer):
    """AdamW over stacked parameters (K, …), with a rate and a decay for each of the K.

    `lr` and `weight_decay` of a group are lists; only the first len(lr) of the stack move. Step for
    step the arithmetic of `torch.optim.AdamW`.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: list[float], weight_decay: list[float],
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            count, (beta1, beta2) = len(group["lr"]), group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            moving = [p[:count] for p in params]
            grads = [p.grad[:count] for p in params]
            means = [self.state[p]["exp_avg"][:count] for p in params]
            squares = [self.state[p]["exp_avg_sq"][:count] for p in params]

            rates = list(zip(group["lr"], group["weight_decay"], strict=False))
            torch._foreach_mul_(moving, columns([1 - lr * decay for lr, decay in rates], moving))
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            below = torch._foreach_sqrt(squares)
            torch._foreach_div_(below, (1 - beta2 ** group["step"]) ** 0.5)
            torch._foreach_add_(below, group["eps"])
            sizes = columns([lr / (1 - beta1 ** group["step"]) * -1 for lr in group["lr"]], moving)
            torch._foreach_addcdiv_(moving, torch._foreach_mul(means, sizes), below)


def clip_each(parameters: Sequence[nn.Parameter], limits: Sequence[float]) -> None:
    """Clip the gradient norm of each LoRA in a stack by itself; 0 for no limit."""
    if not any(limits):
        return
    grads = [p.grad[: len(limits)] for p in parameters if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
    bounds = norms.new_tensor([limit or math.inf for limit in limits])
    factors = (bounds / (norms + 1e-6)).clamp(max=1.0).view(-1, 1, 1)
    torch._foreach_mul_(grads, [factors] * len(grads))


def columns(values: Sequence[float], stacked: Sequence[Tensor]) -> list[Tensor]:
    """One value a LoRA, to multiply each of the stacked tensors with."""
    like = stacked[0]
    one = like.new_tensor(values)
    return [one.view(-1, *[1] * (like.ndim - 1))] * len(stacked)
