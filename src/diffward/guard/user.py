"""The simulated user's optimizers, a tensor at a time, so that a step can be made as a gradient arrives.

`change(name, gradient)` gives what a step of unit length adds to the tensor; the caller scales it. Many vectors may come as one,
with the sizes of its `parts`: what comes out is what each alone would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffward.errors import InputError


class Optimizer(Protocol):
    """`change` gives the step, learning rate left out; `state`/`load` make a run resume."""

    def change(self, name: str, gradient: Tensor, parts: Sequence[int] | None = None) -> Tensor: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class SGD:
    """Plain gradient descent, as the public code has it."""

    def change(self, name: str, gradient: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        return -gradient

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class _Moments:
    """What optimizers that keep something of each tensor share."""

    def __init__(self, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.beta2, self.eps = beta2, eps
        self._kept: dict[str, list[Tensor]] = {}
        self._steps: dict[str, int] = {}

    def _count(self, name: str) -> int:
        self._steps[name] = self._steps.get(name, 0) + 1
        return self._steps[name]

    def state(self) -> dict[str, Any]:
        return {"kept": self._kept, "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        self._kept, self._steps = state["kept"], state["steps"]


class AdamW(_Moments):
    """The attacker's: AdamW (Loshchilov & Hutter 2019), weight decay left to the caller. Two copies of the weights."""

    beta1 = 0.9

    def change(self, name: str, gradient: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        n = self._count(name)
        if name not in self._kept:
            self._kept[name] = [torch.zeros_like(gradient), torch.zeros_like(gradient)]
        first, second = self._kept[name]
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = (second / (1 - self.beta2**n)).sqrt_().add_(self.eps)
        return (first / (1 - self.beta1**n)).div_(root).neg_()


class Factored(_Moments):
    """Adam without momentum, its second moments factored over rows and columns (Shazeer & Stern 2018).

    Steps of the same size as AdamW's; keeps a row and a column a matrix, next to nothing.
    """

    def change(self, name: str, gradient: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        left = 1 - self.beta2 ** self._count(name)
        matrix = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient
        square = matrix * matrix
        if matrix.ndim == 1:
            (second,) = self._of(name, [square])
            second.lerp_(square, 1 - self.beta2)
            step = torch.div(matrix, (second / left).sqrt_().add_(self.eps), out=square)
            sizes = [len(step)] if parts is None else list(parts)
            longest = _root_means(step, sizes).clamp_min_(1.0)
            step.div_(longest.repeat_interleave(torch.tensor(sizes, device=step.device)))
            return step.neg_()
        column, row = self._of(name, [square[0], square[:, 0]])
        row.lerp_(square.mean(1), 1 - self.beta2)
        column.lerp_(square.mean(0), 1 - self.beta2)
        by_row = (row / row.mean().clamp_min(torch.finfo(row.dtype).tiny)).sqrt_().add_(self.eps)
        by_column = (column / left).sqrt_().add_(self.eps)
        step = torch.mul(matrix, by_row.reciprocal_()[:, None], out=square).mul_(
            by_column.reciprocal_()
        )
        # One entry of a factored moment may be far too small: no step above 1 root mean square (their d = 1).
        size = float(torch.linalg.vector_norm(step)) / step.numel() ** 0.5
        return step.mul_(-1 / max(size, 1.0)).view_as(gradient)

    def _of(self, name: str, like: Sequence[Tensor]) -> list[Tensor]:
        if name not in self._kept:
            self._kept[name] = [torch.zeros_like(one) for one in like]
        return self._kept[name]


def _root_means(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Root mean square of each part of values (n,)."""
    lengths = torch.tensor(sizes, device=values.device)
    return torch.segment_reduce(values * values, "mean", lengths=lengths).sqrt_()


def make_optimizer(name: str) -> Optimizer:
    kinds: dict[str, type[Any]] = {"sgd": SGD, "adamw": AdamW, "factored": Factored}
    if name not in kinds:
        raise InputError(f"--user-optimizer {name}: choose {', '.join(kinds)}")
    optimizer: Optimizer = kinds[name]()
    return optimizer
