"""The likelihood-ratio attack of Carlini et al. 2022, with shadow LoRAs.

Target statistic: phi(x) = mean_k [l_base(x, t_k, eps_k) - l_LoRA(x, t_k, eps_k)], as shadows' gains.
"""

from __future__ import annotations

import numpy as np

from diffward.errors import InputError
from diffward.membership.attack import ATTACKS
from diffward.membership.bank import OFF, ON, Bank
from diffward.membership.shadow_gains import Shadows, Side

_PAPER = "Carlini et al. 2022 (arXiv 2112.03570)"
# Below so many shadows a side a picture has no variance of its own (the paper: below 64 in all); above,
# it counts for as much as its shadows against so many of the common one.
FEW, PRIOR = 8, 4
_FLOOR = 1e-30


@ATTACKS.register(
    "lira", paper=_PAPER, access="grey box, with the base model and shadow LoRAs",
    cost="2 queries a pair, and the shadows' training", asks=(("errors", ON), ("errors", OFF)), needs=("shadows",),
    suite="standard",
)  # fmt: skip
def lira(bank: Bank) -> np.ndarray:
    """Is the gain that of shadows which saw the picture? s = log N(phi; mu_in, s_in) - log N(phi; mu_out, s_out).

    With few shadows the noise of their means drowns mu_in - mu_out of a single picture, so it is drawn
    towards its mean over the pictures, as far as the shadows' own spread says; with many it stays.
    """
    phi, shadows = target_and_shadows(bank)
    seen, unseen = shadows.side(True), shadows.side(False)
    if few(seen) or few(unseen):
        # One for both, as in the authors' code. Two would make the score fall again beyond mu_in where
        # the target was trained longer than its shadows.
        v_in = v_out = np.full(len(phi), pooled(seen, unseen))
    else:
        v_in, v_out = variances(seen), variances(unseen)
    noise = v_in / seen.count + v_out / unseen.count
    apart = seen.mean - unseen.mean
    varies = max(float(apart.var(ddof=1) - noise.mean()), 0.0)
    weight = varies / (varies + noise)
    apart = apart.mean() + weight * (apart - apart.mean())
    middle = (seen.mean + unseen.mean) / 2
    doubt = noise * (1 + weight) / 4  # of each mean: v / count where nothing is drawn together

    def log_density(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        return -((phi - mean) ** 2 / variance + np.log(variance)) / 2

    return log_density(middle + apart / 2, v_in + doubt) - log_density(
        middle - apart / 2, v_out + doubt
    )


@ATTACKS.register(
    "lira_offline", paper=_PAPER, access="grey box, with the base model and shadow LoRAs",
    cost="2 queries a pair, and the shadows' training", asks=(("errors", ON), ("errors", OFF)), needs=("shadows",),
    suite="standard",
)  # fmt: skip
def lira_offline(bank: Bank) -> np.ndarray:
    """Is the gain too large for shadows which did not see the picture? s = (phi - mu_out) / s_out.

    The paper's 1 - Pr[N(mu_out, s_out) > phi] is an increasing function of it that runs into ties.
    """
    phi, shadows = target_and_shadows(bank)
    unseen = shadows.side(False)
    variance = np.full(len(phi), pooled(unseen)) if few(unseen) else variances(unseen)
    return (phi - unseen.mean) / np.sqrt(variance * (1 + 1 / unseen.count))


def target_and_shadows(bank: Bank) -> tuple[np.ndarray, Shadows]:
    """phi (N,) of the audited model, and its shadows."""
    if bank.shadows is None:
        raise InputError("this attack needs shadow LoRAs (--shadows)")
    phi, shadows = bank.gain().mean(axis=1), bank.shadows
    if shadows.gain.shape[1] != len(phi):
        raise InputError(f"the shadows know {shadows.gain.shape[1]} pictures, not these {len(phi)}")
    return phi, shadows


def few(side: Side) -> bool:
    return int(side.count.min()) < FEW


def pooled(*sides: Side) -> float:
    """Variance of a picture's gain from shadow to shadow, the same for all pictures."""
    squares = sum(float(side.squares.sum()) for side in sides)
    return squares / sum(int((side.count - 1).sum()) for side in sides) + _FLOOR


def variances(side: Side) -> np.ndarray:
    """Variance (N,) of each picture's gain, drawn towards the common one."""
    return (PRIOR * pooled(side) + side.squares) / (PRIOR + side.count - 1)
