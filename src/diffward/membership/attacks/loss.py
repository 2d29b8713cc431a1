"""The loss attack."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank


@ATTACKS.register(
    "loss",
    paper="Matsumoto et al. 2023 (arXiv 2302.03262); Carlini et al. 2023 (arXiv 2301.13188)",
    access="grey box",
    cost="1 query a pair",
    queries=lambda pairs: pairs,
)
def loss(bank: Bank) -> np.ndarray:
    """A picture that the model denoises well is likely a member: s = -mean_k l_LoRA(x, t_k, eps_k)."""
    return -bank.of(ON).mean(axis=1)
