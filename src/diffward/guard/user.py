"""The simulated user's optimizers, a tensor at a time, so that a step can be made as a gradient arrives.

`change(name, gradient)` gives what a step of unit length adds to the tensor; the caller scales it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from diffward.errors import InputError


class Optimizer(Protocol):
    """`change` gives the step, learning rate left out; `state`/`load` make a run resume."""

    def change(self, name: str, gradient: Tensor) -> Tensor: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class SGD:
    """Plain gradient descent, as the public code has it."""

    def change(self, name: str, gradient: Tensor) -> Tensor:
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

    def change(self, name: str, gradient: Tensor) -> Tensor:
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

    def change(self, name: str, gradient: Tensor) -> Tensor:
        n = self._count(name)
        matrix = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient
        if name not in self._kept:
            sides = [0, 1] if matrix.ndim > 1 else [None]
            self._kept[name] = [
                torch.zeros_like(matrix if side is None else matrix.select(side, 0))
                for side in sides
            ]
        square = matrix * matrix
        if matrix.ndim == 1:
            (second,) = self._kept[name]
            second.lerp_(square, 1 - self.beta2)
            scale = (second / (1 - self.beta2**n)).sqrt_()
        else:
            column, row = self._kept[name]
            row.lerp_(square.mean(1), 1 - self.beta2)
            column.lerp_(square.mean(0), 1 - self.beta2)
            norm = row.mean().clamp_min(torch.finfo(row.dtype).tiny)
            scale = torch.outer(row / norm, column).div_(1 - self.beta2**n).sqrt_()
        # One entry of a factored moment may be far too small: no step above 1 root mean square (their d = 1).
        step = matrix / scale.add_(self.eps)
        step.div_(step.square().mean().sqrt().clamp_min(1.0)).neg_()
        return step.view_as(gradient)


def make_optimizer(name: str) -> Optimizer:
    kinds: dict[str, type[Any]] = {"sgd": SGD, "adamw": AdamW, "factored": Factored}
    if name not in kinds:
        raise InputError(f"--user-optimizer {name}: choose {', '.join(kinds)}")
    optimizer: Optimizer = kinds[name]()
    return optimizer
