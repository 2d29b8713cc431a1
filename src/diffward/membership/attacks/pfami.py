"""PFAMI: a member sits at a local optimum, so its neighbours are worse."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank


@ATTACKS.register(
    "pfami",
    paper="Fu et al. 2023 (arXiv 2308.12143)",
    access="grey box",
    cost="2 queries for each of the less noisy half of the pairs",
    asks=(("errors", ON), ("crops", ON)),
    suite="standard",
    queries=lambda layout: 2 * len(layout.early),
)
def pfami(bank: Bank) -> np.ndarray:
    """A crop of a member is much harder than the member: s = mean_j [l(crop_j, t_j) - l(x, t_j)] / l(x, t_j).

    Crops keep .95 to .7 of the side, from the least noisy pair to that of t = 500, each with the
    noise of its original. The paper's full grid has every crop at every timestep; its 20 queries are
    one timestep a crop, as here.
    """
    own = bank.of("errors", ON)[:, bank.layout.early]
    return ((bank.of("crops", ON) - own) / own).mean(axis=1)
