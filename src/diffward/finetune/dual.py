"""Dual: the hinge's weight follows from what the gauge reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffward.finetune.gauge import Reading
from diffward.finetune.hinge import CHANCE
from diffward.finetune.method import METHODS, Run, Verdict
from diffward.finetune.private import Private

GAIN = 2.0  # of the starting weight, that an AUC of 1 above the target adds at one reading


@METHODS.register(
    "dual",
    paper="this project; dual ascent: Boyd and Vandenberghe 2004, 5.5",
    access="-",
    cost="1 forward and backward, 1 no-grad forward of half the batch a step, and the gauge",
)
class Dual(Private):
    """L_i + mu max(0, log 2 - CE_i), mu by dual ascent until the gauge's AUC is at its target.

    Minimise L so that AUC <= target: after each reading mu <- max(0, mu + eta (AUC - target)). mu starts at
    `--privacy.weight`, and eta is `GAIN` times that. The gauge's pictures are none that the attacker learns
    from, so mu answers to what carries over to pictures the attacker never saw.
    """

    needs_gauge = True
    options = Private.options | {"privacy.target_auc"}
    default_weight = 0.05

    def start(self, run: Run) -> None:
        super().start(run)
        self.mu, self.target = self.weight, run.settings.privacy.target_auc

    def objective(self, loss: Tensor, ce: Tensor) -> Tensor:
        return loss + self.mu * (CHANCE - ce).relu()

    def read(self, reading: Reading) -> Verdict:
        self.mu = max(0.0, self.mu + GAIN * self.weight * (reading.auc - self.target))
        return "go"

    def state(self) -> dict[str, Any]:
        return super().state() | {"mu": self.mu}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.mu = float(state["mu"])

    def told(self) -> str:
        return f"{super().told()}, mu {self.mu:.3g}"

    def facts(self) -> dict[str, str]:
        return super().facts() | {"ss_privacy_target_auc": f"{self.target:g}"}
