"""Weights between the base's and the fine-tuned ones, and the simulated user who moves them.

theta = theta_ft + m (theta_pre - theta_ft), one m a tensor (FreezeAsGuard, eq. 5). The UNet holds theta,
theta_ft lies in memory and theta_pre in a file: two copies of the weights. A gradient is used as it
arrives, for the mask and for the user's step, and freed; there is never a copy of all gradients. Only those of
vectors (norms, biases: a thousandth of the weights, and most of the tensors) wait for one another, and are
dealt with as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffward.guard.processes import average
from diffward.guard.user import Optimizer
from diffward.models.parameters import parameters_of

_VECTORS = "vectors"  # what they are called by the user's optimizer


class Effective:
    """The effective weights of a UNet under a soft mask.

    Attributes:
        mask: m (N,), float64 on the CPU; 1 = frozen at theta_pre.
        tuned: theta_ft by name.
    """

    def __init__(
        self, unet: nn.Module, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], mask: Tensor,
        user: Optimizer, lr: float,
    ) -> None:  # fmt: skip
        self.parameters = parameters_of(unet)
        self.base, self.user, self.lr = base, user, lr
        vectors = [name for name, p in self.parameters.items() if p.ndim == 1]
        own = {n: tuned[n].to(p.device) for n, p in self.parameters.items()}
        self._vectors = _Vectors(vectors, base, own)
        parts = self._vectors.parts(self._vectors.tuned)
        self.tuned = {n: parts[n] if n in parts else t.clone() for n, t in own.items()}
        self.moving = True
        self._products: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self.set_mask(mask)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Recompute theta; nothing is accumulated."""
        self.mask = mask.double()
        self._m = dict(zip(self.parameters, self.mask.tolist(), strict=True))
        for name, parameter in self.parameters.items():
            torch.lerp(self.tuned[name], self.base[name], self._m[name], out=parameter.data)

    def __enter__(self) -> Effective:
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)
            if parameter.ndim != 1:
                hook = parameter.register_post_accumulate_grad_hook(self._arrives(name))
                self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False).grad = None

    def backward(self, loss: Tensor, *, move: bool = True) -> Tensor:
        """s (N,): s_i = <theta_pre_i - theta_ft_i, dL/dtheta_i> = dL/dm_i; and the user's step if `move`.

        The user's step is D = lr (1 - m) u, u the optimizer's unit step; theta_ft and theta move by D and
        (1 - m) D (eqs. 9, 10, 12).
        """
        self.moving = move
        self._products = {}
        loss.backward()
        self._all_vectors()
        missing = torch.zeros((), dtype=torch.float32, device=loss.device)
        found = [self._products.get(name, missing) for name in self.parameters]
        return torch.stack(found).cpu().double()

    def _arrives(self, name: str) -> Callable[[nn.Parameter], None]:
        @torch.no_grad()
        def hook(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            average(gradient)
            base, tuned, m = self.base[name], self.tuned[name], self._m[name]
            self._products[name] = torch.dot((base - tuned).flatten(), gradient.flatten())
            if self.moving:
                self.user.move(name, tuned, gradient, self.lr * (1 - m))
                torch.lerp(tuned, base, m, out=parameter.data)

        return hook

    @torch.no_grad()
    def _all_vectors(self) -> None:
        """What `_arrives` does, for all vectors at once."""
        vectors = self._vectors
        own: list[Tensor] = [self.parameters[name] for name in vectors.sizes]
        if not own:
            return
        gradient = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for p in own])
        for parameter in own:
            parameter.grad = None
        average(gradient)
        base, tuned = vectors.base, vectors.tuned
        products = torch.segment_reduce((base - tuned) * gradient, "sum", lengths=vectors.lengths)
        self._products |= dict(zip(vectors.sizes, products.unbind(), strict=True))
        if self.moving:
            m = torch.tensor([self._m[name] for name in vectors.sizes], device=tuned.device)
            m = m.to(tuned.dtype).repeat_interleave(vectors.lengths)
            rate = self.lr * (1 - m)
            self.user.move(_VECTORS, tuned, gradient, rate, list(vectors.sizes.values()))
            torch._foreach_copy_(own, list(vectors.parts(torch.lerp(tuned, base, m)).values()))


class _Vectors:
    """All one-dimensional tensors as one, theta_pre and theta_ft; `parts` are views of it by name."""

    def __init__(
        self, names: list[str], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]
    ) -> None:
        self.sizes = {name: len(tuned[name]) for name in names}
        self.base = torch.cat([base[name] for name in names]) if names else torch.empty(0)
        self.tuned = torch.cat([tuned[name] for name in names]) if names else torch.empty(0)
        self.lengths = torch.tensor(list(self.sizes.values()), device=self.tuned.device)

    def parts(self, whole: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.sizes, whole.split(list(self.sizes.values())), strict=True))
