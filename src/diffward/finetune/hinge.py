"""Hinge: no pressure once the attacker is at chance."""

from __future__ import annotations

import math

from torch import Tensor

from diffward.finetune.method import METHODS
from diffward.finetune.private import Private

CHANCE = math.log(2)  # cross-entropy of an attacker that knows nothing


@METHODS.register(
    "hinge",
    paper="this project; after Luo et al. 2025 (arXiv 2402.11989)",
    access="-",
    cost="1 forward and backward, 1 no-grad forward of half the batch a step",
)
class Hinge(Private):
    """L_i + lambda max(0, log 2 - CE_i): no pressure on a picture once the attacker is at chance on it.

    Bounded below, and at rest where members look like others: it does not push them to look less so, which
    would give them away too.
    """

    default_weight = 0.1

    def objective(self, loss: Tensor, ce: Tensor) -> Tensor:
        return loss + self.weight * (CHANCE - ce).relu()
