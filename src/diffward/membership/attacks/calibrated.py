"""The loss attack, calibrated by the base model."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import OFF, ON, Bank


@ATTACKS.register(
    "calibrated",
    paper="Watson et al. 2022 (arXiv 2111.08440); Carlini et al. 2022 (arXiv 2112.03570), base as reference",
    access="grey box, with the base model",
    cost="2 queries a pair",
    asks=(("errors", ON), ("errors", OFF)),
    suite="standard",
)
def calibrated(bank: Bank) -> np.ndarray:
    """What the adapter made easier is likely a member: s = mean_k [l_base(x, t_k, eps_k) - l_LoRA(x, t_k, eps_k)]."""
    return bank.gain().mean(axis=1)
