"""The optimizer of full fine-tuning and of LoRAs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def adamw(
    parameters: Sequence[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """torch's fused AdamW: a step without a copy of the weights besides, and a faster one.

    It goes through memory and says nothing where a gradient lies otherwise than its parameter: such a one is put
    right first, whoever made it (`dp` makes its own within the step).
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    optimizer.register_step_pre_hook(lambda *_: _same_layout(parameters))
    return optimizer


def _same_layout(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        if p.grad is not None and p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)
