"""The mask update as FreezeAsGuard's public code has it, for comparison.

With the published settings its first step of the sparsity penalty decides the mask: on small models it came
out as the highest of the random initial logits, whatever the pictures. See docs/guard.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffward.guard.bilevel import Bilevel

if TYPE_CHECKING:
    from diffward.guard.settings import GuardSettings

SPARSITY, STEP = 5e3, 10.0


class Published(Bilevel):
    """x <- x - eta <d, g> m (1 - m) / T - c d/dx (mean(m) - rho)^2, from random x in (0, 1); eqs. 8, 11.

    g is the gradient of (L_inn - L_ill) / 2. The published mask is m > 1/2; here the logits are scores, and
    the budget is met exactly afterwards.
    """

    apart = True

    def __init__(self, settings: GuardSettings, count: int) -> None:
        self.settings = settings
        self.x = torch.rand(count, generator=torch.Generator().manual_seed(settings.seed)).double()

    def mask(self) -> Tensor:
        return torch.sigmoid(self.x / self.settings.temperature)

    def update(self, illegal: Tensor, innocent: Tensor) -> None:
        m, temperature = self.mask(), self.settings.temperature
        slope = m * (1 - m) / temperature
        data = STEP * (innocent - illegal) / 2 * slope
        sparsity = SPARSITY * 2 * (m.mean() - self.settings.budget) * slope / len(m)
        self.x -= data + sparsity

    def scores(self) -> Tensor:
        return self.x

    def state(self) -> dict[str, Any]:
        return {"x": self.x}

    def load(self, state: dict[str, Any]) -> None:
        self.x = state["x"]
