"""Early stopping: the defence that every other one must beat."""

from __future__ import annotations

import math
from typing import Any

from diffward.finetune.gauge import Reading
from diffward.finetune.method import METHODS, Run, Verdict
from diffward.finetune.plain import Plain


@METHODS.register(
    "earlystop",
    paper="Prechelt 1998",
    access="-",
    cost="1 forward and backward a step, and the gauge",
)
class EarlyStop(Plain):
    """Plain fine-tuning that keeps the weights of the best validation loss and stops once it has passed.

    It stops after `--gauge.patience` readings in a row without a better one.
    """

    needs_gauge = True
    options = frozenset({"gauge.patience"})

    def start(self, run: Run) -> None:
        self.patience = run.settings.gauge.patience
        self.best, self.since = math.inf, 0

    def read(self, reading: Reading) -> Verdict:
        if reading.validation_loss < self.best:
            self.best, self.since = reading.validation_loss, 0
            return "keep"
        self.since += 1
        return "stop" if self.since >= self.patience else "go"

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since}

    def load(self, state: dict[str, Any]) -> None:
        self.best, self.since = float(state["best"]), int(state["since"])

    def told(self) -> str:
        return f"no better for {self.since}" if self.since else ""

    def facts(self) -> dict[str, str]:
        return {"ss_privacy_method": "earlystop"}
