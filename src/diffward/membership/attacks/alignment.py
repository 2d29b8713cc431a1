"""How far the LoRA went where a picture's gradient pulls the base.

Cosines of gradients tell members apart in federated learning (Li, Li and Ribeiro 2023, ICLR), where an update is of a
step or few; here it is the whole fine-tuning. Needs no labels and nothing that the fine-tuned model predicts: a defence
that flattens the losses does not thereby turn the weights elsewhere.
"""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank


@ATTACKS.register(
    "alignment", paper="ours", access="white box, with the base",
    cost="8 forward and backward passes of the base", asks=(("alignment", ON),), suite="thorough",
)  # fmt: skip
def alignment(bank: Bank) -> np.ndarray:
    """s = mean over modules of cos(-G, W), G the base's gradient at the picture, W what was learned."""
    cosines = bank.of("alignment", ON)
    if not cosines.shape[1]:
        return np.zeros(len(cosines))  # the UNet learned nothing
    return np.asarray(cosines.mean(1))
