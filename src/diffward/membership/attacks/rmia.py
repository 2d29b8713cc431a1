"""Robust membership inference (Zarifzadeh et al. 2024), with shadow LoRAs as reference models."""

from __future__ import annotations

import numpy as np
from scipy.special import expit, logsumexp

from diffward.membership.attack import ATTACKS
from diffward.membership.attacks.lira import pooled, target_and_shadows
from diffward.membership.bank import OFF, ON, Bank

# Of exp(gain / T), in standard deviations of a picture's gain from shadow to shadow. At 1 and below
# the mean over few shadows is that of the luckiest one; far above, only means of gains are compared.
TEMPERATURE = 2.0
_ROWS = 256


@ATTACKS.register(
    "rmia", paper="Zarifzadeh et al. 2024 (arXiv 2312.03262)", access="grey box, with the base model and shadow LoRAs",
    cost="2 queries a pair, and the shadows' training", asks=(("errors", ON), ("errors", OFF)), needs=("shadows",),
    suite="standard",
)  # fmt: skip
def rmia(bank: Bank) -> np.ndarray:
    """Did training favour the picture over others? s = share of pictures z with LR(x) / LR(z) >= gamma.

    LR(x) = p(x | LoRA) / p(x), p(x) the mean of the shadows which saw x and of those which did not (the
    online form), p(x | model) ~ exp(gain / T). The share is averaged over gamma with density
    1 / (1 + gamma)^2, where it is the mean over z of LR(x) / (LR(x) + LR(z)), and is given as log-odds:
    no ties. All other pictures serve as z: who is a member among them does not matter, as the score is
    an increasing function of LR(x), the same for every x.
    """
    phi, shadows = target_and_shadows(bank)
    seen, unseen = shadows.side(True), shadows.side(False)
    scale = TEMPERATURE * np.sqrt(pooled(seen, unseen))
    parts = np.where(shadows.inside, 0.5 / seen.count, 0.5 / unseen.count)
    ratio = phi / scale - logsumexp(shadows.gain / scale, b=parts, axis=0)
    favoured, other = np.zeros(len(phi)), np.zeros(len(phi))
    for start in range(0, len(phi), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(phi)))
        wins = expit(ratio[rows, None] - ratio)
        wins[np.arange(len(rows)), rows] = 0.0
        favoured[rows] += wins.sum(axis=1)
        other += wins.sum(axis=0)
    tiny = np.finfo(float).tiny
    return np.log(np.maximum(favoured, tiny)) - np.log(np.maximum(other, tiny))
