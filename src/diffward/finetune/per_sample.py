"""Gradients of LoRA factors for each sample of a batch.

opacus's own hooks add them to the ordinary gradient and unfold the input of a convolution. Here the
factors' backward pass makes them in its place, so they cost about what the ordinary gradient costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from diffward.errors import TrainingError

Factor = nn.Linear | nn.Conv2d


class PerSample:
    """While it is on, a backward pass leaves `weight.grad_sample` (n, *shape) with each factor.

    That is where opacus's optimizer looks for them. `weight.grad` stays empty.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        """Factors without bias or groups, whose input has the sample as first dimension."""
        self.factors = list(factors)
        for factor in self.factors:
            if factor.bias is not None or getattr(factor, "groups", 1) > 1:
                raise TrainingError(f"dp cannot train {factor}: only factors without bias, groups")
            factor.weight.grad_sample = None  # type: ignore[attr-defined]
            factor.forward = partial(_apply, factor)  # type: ignore[method-assign]

    def remove(self) -> None:
        for factor in self.factors:
            factor.__dict__.pop("forward", None)
            for name in ("grad_sample", "summed_grad"):
                factor.weight.__dict__.pop(name, None)


def _apply(factor: Factor, x: Tensor) -> Tensor:
    return _PerSampleGradient.apply(x, factor.weight, factor)


class _PerSampleGradient(torch.autograd.Function):
    """The layer as it is, but for the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: Factor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return type(factor).forward(factor, x)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (x, weight), factor = ctx.saved_tensors, ctx.factor
        if factor.weight.grad_sample is not None:
            raise TrainingError(
                "a LoRA factor was used twice in one pass: dp cannot tell the pictures' gradients apart"
            )
        # Under autocast, what was multiplied was narrower than x and the weight.
        x, weight = x.to(grad.dtype), weight.to(grad.dtype)
        linear = isinstance(factor, nn.Linear)
        samples = linear_gradients(x, grad) if linear else convolution_gradients(factor, x, grad)
        factor.weight.grad_sample = samples.to(factor.weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        if linear:
            return grad @ weight, None, None
        geometry = factor.stride, factor.padding, factor.dilation
        return conv2d_input(x.shape, weight, grad, *geometry), None, None


def linear_gradients(x: Tensor, grad: Tensor) -> Tensor:
    """x (n, …, in) and the gradient (n, …, out) of the output to (n, out, in)."""
    x, grad = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    return grad.transpose(1, 2) @ x


def convolution_gradients(factor: nn.Conv2d, x: Tensor, grad: Tensor) -> Tensor:
    """x (n, in, H, W) and the gradient (n, out, h, w) of the output to (n, out, in, kh, kw).

    dL/dW[o, i, k] = sum_q grad[o, q] x[i, stride q + dilation k - padding]. The sum is taken over the
    places p of x instead: grad is laid out over them and unfolded. Unfolding x would take a hundred times the
    memory, for x has hundreds of channels and grad has `rank`.
    """
    n, out, kernel = len(x), grad.shape[1], factor.kernel_size
    if kernel != (1, 1) or factor.stride != (1, 1):
        padding = cast(tuple[int, ...], factor.padding)
        reach = [d * (k - 1) for d, k in zip(factor.dilation, kernel, strict=True)]
        spread = grad.new_zeros(n, out, x.shape[2] + reach[0], x.shape[3] + reach[1])
        rows, columns = (
            slice(r - p, r - p + s * (size - 1) + 1, s)
            for r, p, s, size in zip(reach, padding, factor.stride, grad.shape[2:], strict=True)
        )
        spread[:, :, rows, columns] = grad
        # (n, out, k, p); a window that begins at p runs through the kernel backwards.
        grad = F.unfold(spread, kernel, dilation=factor.dilation).view(
            n, out, kernel[0] * kernel[1], -1
        )
        grad = grad.flip(2)
    samples = grad.reshape(n, -1, x.shape[2] * x.shape[3]) @ x.flatten(2).transpose(1, 2)
    return samples.view(n, out, *kernel, x.shape[1]).permute(0, 1, 4, 2, 3).contiguous()
