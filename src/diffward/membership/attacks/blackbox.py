"""Black box: what the model draws from a member's caption looks like the member."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank


@ATTACKS.register(
    "blackbox",
    paper="Pang & Wang 2025, NDSS (arXiv 2312.08207); Wu et al. 2022 (arXiv 2210.00968), attack II-S",
    access="black box",
    cost="2 pictures drawn",
    asks=(("generated", ON),),
    needs=("captions",),
    suite="thorough",
)
def blackbox(bank: Bank) -> np.ndarray:
    """Mean similarity to pictures drawn from the caption: s = mean_r cos(pool z, pool z_r), less their means.

    The papers compare embeddings of an image network and learn the threshold on shadow models; here
    latents are compared and no threshold is needed.
    """
    return bank.of("generated", ON)[:, :, 0].mean(axis=1)
