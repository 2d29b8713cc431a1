"""Proximal initialisation: the model's own noise instead of a random draw."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank

_PAPER = "Kong et al. 2024 (arXiv 2305.18355)"


@ATTACKS.register(
    "pia", paper=_PAPER, access="grey box", cost="2 queries", asks=(("pia", ON),), suite="standard",
    queries=lambda layout: 2,
)  # fmt: skip
def pia(bank: Bank) -> np.ndarray:
    """Noise that the model itself sees in a member comes back: s = -||e0 - eps(z_t(e0), t, c)||_4, t = 500."""
    return -bank.of("pia")[:, 0]


@ATTACKS.register(
    "pian", paper=_PAPER, access="grey box", cost="2 queries", asks=(("pia", ON),), suite="standard",
    queries=lambda layout: 2,
)  # fmt: skip
def pian(bank: Bank) -> np.ndarray:
    """PIA with the noise first scaled to the size of Gaussian noise, as the authors' code does it."""
    return -bank.of("pia")[:, 1]
