"""MP: membership-privacy-preserving fine-tuning, as a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffward.errors import TrainingError
from diffward.finetune.method import METHODS, Run
from diffward.finetune.private import Private, everyones

MOST_CE = 8.0  # mean cross-entropy at which the attacker is told nonsense: members taken for others, 3000 to 1
MOST_RISE = 4.0  # of the mean loss above its lowest
MEMORY = 100  # samples that the means reach back over


@METHODS.register(
    "mp",
    paper="MP-LoRA: Luo et al. 2025 (arXiv 2402.11989), eq. 6",
    access="-",
    cost="1 forward and backward, 1 no-grad forward of half the batch a step; paper mode: 2 and 1",
)
class MP(Private):
    """MP-LoRA: L_i - lambda CE_i, the sum of the paper; not bounded below, smp and hinge are.

    A run that runs away (the attacker's cross-entropy or the loss itself) ends with an error.
    """

    options = Private.options | {"privacy.paper"}
    default_weight = 0.02
    paper_weight = 0.05

    def start(self, run: Run) -> None:
        super().start(run)
        # Running means of (loss, CE), their weight, and the lowest mean loss so far.
        self.means, self.reach, self.lowest = torch.zeros(2), 0.0, float("inf")
        self._seen: list[Tensor] = []

    def objective(self, loss: Tensor, ce: Tensor) -> Tensor:
        self._seen.append(torch.stack([loss, ce], dim=1).detach().cpu())
        return loss - self.weight * ce

    def after_step(self, step: int) -> None:
        super().after_step(step)
        seen, self._seen = torch.cat(everyones(self._seen)), []
        keep = (1 - 1 / MEMORY) ** len(seen)
        self.means = keep * self.means + (1 - keep) * seen.mean(dim=0)
        self.reach = keep * self.reach + 1 - keep
        loss, ce = (self.means / self.reach).tolist()
        if self.reach < 0.5:
            return
        self.lowest = min(self.lowest, loss)
        if ce > MOST_CE or loss > MOST_RISE * self.lowest:
            raise TrainingError(
                f"step {step}: the sum runs away (mean loss {loss:.3g}, lowest {self.lowest:.3g}; attacker's "
                f"cross-entropy {ce:.3g}); lower --privacy.weight {self.weight:g}, or use smp or hinge"
            )

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "means": self.means,
            "reach": self.reach,
            "lowest": self.lowest,
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.means, self.reach, self.lowest = state["means"], state["reach"], state["lowest"]
