"""Weights between the base's and the fine-tuned ones, and the simulated user who moves them.

theta = theta_ft + m (theta_pre - theta_ft), one m a tensor (FreezeAsGuard, eq. 5). The UNet holds theta,
theta_ft lies in memory and theta_pre in a file: two copies of the weights. A gradient is used as it
arrives, for the mask and for the user's step, and freed; there is never a copy of all gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffward.guard.stored import parameters_of
from diffward.guard.user import Optimizer


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
        self.tuned = {n: tuned[n].to(p.device).clone() for n, p in self.parameters.items()}
        self.moving = True
        self._products: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self.set_mask(mask)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Recompute theta; nothing is accumulated."""
        self.mask = mask.double()
        for m, (name, parameter) in zip(self.mask.tolist(), self.parameters.items(), strict=True):
            torch.lerp(self.tuned[name], self.base[name], m, out=parameter.data)

    def __enter__(self) -> Effective:
        for (name, parameter), m in zip(
            self.parameters.items(), range(len(self.parameters)), strict=True
        ):
            parameter.requires_grad_(True)
            self._handles.append(
                parameter.register_post_accumulate_grad_hook(self._arrives(name, m))
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False).grad = None

    def backward(self, loss: Tensor, *, move: bool = True) -> Tensor:
        """s (N,): s_i = <theta_pre_i - theta_ft_i, dL/dtheta_i> = dL/dm_i; and the user's step if `move`.

        The user's step is D = lr (1 - m) u, u the optimizer's change; theta_ft and theta move by D and
        (1 - m) D (eqs. 9, 10, 12).
        """
        self.moving = move
        self._products = {}
        loss.backward()
        missing = torch.zeros((), dtype=torch.float32, device=loss.device)
        found = [self._products.get(name, missing) for name in self.parameters]
        return torch.stack(found).double().cpu()

    def _arrives(self, name: str, index: int) -> Callable[[nn.Parameter], None]:
        @torch.no_grad()
        def hook(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            _average(gradient)
            base, tuned = self.base[name], self.tuned[name]
            self._products[name] = torch.dot((base - tuned).flatten(), gradient.flatten())
            if self.moving:
                m = float(self.mask[index])
                tuned.add_(self.user.change(name, gradient), alpha=self.lr * (1 - m))
                torch.lerp(tuned, base, m, out=parameter.data)

        return hook


def _average(gradient: Tensor) -> None:
    """Over all processes, so that they share one user and one mask."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
        gradient.div_(torch.distributed.get_world_size())
