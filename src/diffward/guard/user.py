"""The simulated user's optimizers, a tensor at a time, so that a step can be made as a gradient arrives.

`move(name, tensor, gradient, rate)` adds `rate` times a step of unit length to the tensor, in place; the gradient is used
up. Many vectors may come as one, with the sizes of its `parts` and a rate for every entry: what comes out is what each alone
would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffward.errors import InputError


class Optimizer(Protocol):
    """`move` makes a step; `state`/`load` make a run resume."""

    def move(
        self, name: str, tensor: Tensor, gradient: Tensor, rate: float | Tensor,
        parts: Sequence[int] | None = None,
    ) -> None: ...  # fmt: skip
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class SGD:
    """Plain gradient descent, as the public code has it."""

    def move(
        self, name: str, tensor: Tensor, gradient: Tensor, rate: float | Tensor,
        parts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        _subtract(tensor, gradient, rate)

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

    def _of(self, name: str, like: Sequence[Tensor]) -> list[Tensor]:
        if name not in self._kept:
            self._kept[name] = [torch.zeros_like(one) for one in like]
        return self._kept[name]


class AdamW(_Moments):
    """The attacker's: AdamW (Loshchilov & Hutter 2019), weight decay left to the caller. Two copies of the weights."""

    beta1 = 0.9

    def move(
        self, name: str, tensor: Tensor, gradient: Tensor, rate: float | Tensor,
        parts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        n = self._count(name)
        first, second = self._of(name, [gradient, gradient])
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = torch.div(second, 1 - self.beta2**n, out=gradient).sqrt_().add_(self.eps)
        _subtract(tensor, torch.div(first, root, out=root), rate, 1 / (1 - self.beta1**n))


class Factored(_Moments):
    """Adam without momentum, its second moments factored over rows and columns (Shazeer & Stern 2018).

    Steps of the same size as AdamW's; keeps a row and a column a matrix, next to nothing.
    """

    def move(
        self, name: str, tensor: Tensor, gradient: Tensor, rate: float | Tensor,
        parts: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        left = 1 - self.beta2 ** self._count(name)
        if gradient.ndim == 1:
            square = gradient * gradient
            (second,) = self._of(name, [square])
            second.lerp_(square, 1 - self.beta2)
            root = torch.div(second, left, out=square).sqrt_().add_(self.eps)
            step = torch.div(gradient, root, out=root)
            sizes = [len(step)] if parts is None else list(parts)
            longest = _root_means(step, sizes).clamp_min_(1.0)
            step.div_(longest.repeat_interleave(torch.tensor(sizes, device=step.device)))
            _subtract(tensor, step, rate)
            return
        matrix = gradient.reshape(len(gradient), -1)
        square = matrix * matrix
        column, row = self._of(name, [square[0], square[:, 0]])
        for kept, axis in ((row, 1), (column, 0)):
            weight = (1 - self.beta2) / square.shape[axis]
            kept.mul_(self.beta2).add_(square.sum(axis), alpha=weight)
        # second_ij = row_i column_j / mean(row); least is to a moment, not yet divided by `left`, what eps is to its root.
        least = self.eps**2 * left
        by_row, by_column = (kept.add(least).rsqrt_() for kept in (row, column))
        scale = (left * (float(row.sum()) / len(row) + least)) ** 0.5
        step = torch.mul(matrix, by_row[:, None], out=square).mul_(by_column)
        # One entry of a factored moment may be far too small: no step above 1 root mean square (their d = 1).
        size = scale * float(torch.linalg.vector_norm(step)) / step.numel() ** 0.5
        _subtract(tensor, step.view(gradient.shape), rate, scale / max(size, 1.0))


def _subtract(tensor: Tensor, step: Tensor, rate: float | Tensor, by: float = 1.0) -> None:
    """`tensor -= by * rate * step`, in place; a rate for every entry is of the tensor's shape."""
    if isinstance(rate, torch.Tensor):
        tensor.addcmul_(step, rate, value=-by)
    else:
        tensor.add_(step, alpha=-by * rate)


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
