"""SMP: stable membership-privacy-preserving fine-tuning, as a ratio."""

from __future__ import annotations

from torch import Tensor

from diffward.finetune.method import METHODS
from diffward.finetune.private import Private

DELTA = 1e-5  # of the paper; CE is never negative, so it changes nothing


@METHODS.register(
    "smp",
    paper="SMP-LoRA: Luo et al. 2025 (arXiv 2402.11989), eq. 10",
    access="-",
    cost="1 forward and backward, 1 no-grad forward of half the batch a step; paper mode: 2 and 1",
)
class SMP(Private):
    """SMP-LoRA: L_i / (1 + lambda CE_i), the ratio of the paper.

    Its gradient is MP's, with a weight of lambda L_i / (1 + lambda CE_i) that falls with the loss. In paper
    mode the ratio is that of the batch's means.
    """

    options = Private.options | {"privacy.paper"}
    default_weight = 0.1
    paper_weight = 0.05

    def objective(self, loss: Tensor, ce: Tensor) -> Tensor:
        if self.paper:
            ratio = loss.mean() / (1 + self.weight * ce.mean() + DELTA)
            return ratio.expand(len(loss))
        return loss / (1 + self.weight * ce + DELTA)
