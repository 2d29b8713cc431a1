"""The step-wise error of the model's own path."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank


@ATTACKS.register(
    "secmi",
    paper="Duan et al. 2023 (arXiv 2302.01316), SecMI_stat",
    access="grey box",
    cost="16 queries",
    asks=(("secmi", ON),),
    suite="thorough",
)
def secmi(bank: Bank) -> np.ndarray:
    """A model finds its way back to a member: s = -||psi(phi(z_t, t), t) - z_t||_2^2, t = 140."""
    return -(bank.of("secmi") ** 2).sum((1, 2, 3))
