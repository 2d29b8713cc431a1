"""The size of the model's score at the picture."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank


@ATTACKS.register(
    "sima",
    paper="Rao et al. 2025 (arXiv 2509.25003)",
    access="grey box",
    cost="1 query",
    asks=(("sima", ON),),
    suite="standard",
)
def sima(bank: Bank) -> np.ndarray:
    """A model sees little noise in a clean member: s = -||eps(z_0, t, c)||_4, t = 100, no noise added."""
    return -bank.of("sima")
