"""The loss attack, of one noise draw and averaged over several."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank

_PAPER = "Matsumoto et al. 2023 (arXiv 2302.03262); Carlini et al. 2023 (arXiv 2301.13188)"


@ATTACKS.register(
    "loss", paper=_PAPER, access="grey box", cost="1 query", asks=(("errors", ON),), suite="standard",
    queries=lambda layout: 1,
)  # fmt: skip
def loss(bank: Bank) -> np.ndarray:
    """A picture that the model denoises well is likely a member: s = -l(x, t, eps), one draw, t near 450."""
    return -bank.of("errors", ON)[:, bank.layout.middle[len(bank.layout.middle) // 2]]


@ATTACKS.register(
    "loss_mc", paper=_PAPER, access="grey box", cost="1 query a pair", asks=(("errors", ON),), suite="standard"
)  # fmt: skip
def loss_mc(bank: Bank) -> np.ndarray:
    """The loss averaged over noise draws and timesteps: s = -mean_k l(x, t_k, eps_k)."""
    return -bank.of("errors", ON).mean(axis=1)
