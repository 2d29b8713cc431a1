"""An attacker who knows how defended LoRAs are trained.

A defence that pushes the loss of members against a proxy attacker does not make them like the
others: it may move them past the others (members then score low), trade one timestep against
another, flatten the loss and not its gradient, or help the caption less. So this attack is told no
direction and looks where the proxies do not.
"""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import OFF, ON, Bank
from diffward.membership.features import (
    binned,
    discrepancies,
    errors,
    gain,
    gradient_sizes,
    likelihood,
    log,
)


@ATTACKS.register(
    "adaptive",
    paper="after Tramèr et al. 2020 (arXiv 2002.08347): attacks are to adapt to the defence",
    access="white box, with the base model, the captions if there are any, and known members",
    cost="all queries of calibrated, clid, pia, sima and gsa",
    asks=(
        ("errors", ON), ("errors", OFF), ("errors_null", ON), ("errors_reduced", ON),
        ("gradients", ON), ("pia", ON), ("sima", ON),
    ),
    needs=("labels",),
    suite="standard",
)  # fmt: skip
def adaptive(bank: Bank) -> np.ndarray:
    """A logistic regression on what a defence must leave somewhere; also finds members that score low."""
    return bank.crossfit(adaptive_features(bank))


def adaptive_features(bank: Bank) -> np.ndarray:
    """Features (N, 17), or (N, 22) with captions.

    Gain over the base by timestep, 4 with its sign and 4 of its size (its distance from the median
    picture's: either side is suspicious); log variance over pairs of the error and of the gain; 4
    gradient norms; PIA, PIAN and SimA; CLiD's 4 differences and the likelihood that goes with them.
    """
    difference, error = gain(bank), errors(bank)
    unusual = np.abs(difference - np.median(difference, axis=0))
    columns = [
        binned(difference, bank.layout),
        binned(unusual, bank.layout),
        log(error.var(axis=1))[:, None],
        log(difference.var(axis=1))[:, None],
        gradient_sizes(bank),
        log(bank.of("pia", ON)),
        log(bank.of("sima", ON))[:, None],
    ]
    if bank.captions:
        columns += [discrepancies(bank), likelihood(bank)[:, None]]
    return np.concatenate(columns, axis=1)
