"""All grey-box signals in one score, for claims about a whole set (`membership.dataset_inference`)."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.attacks.pfami import pfami
from diffward.membership.bank import OFF, ON, Bank
from diffward.membership.features import binned, discrepancies, errors, gain, log


@ATTACKS.register(
    "cdi",
    paper="Dubiński et al. 2025 (arXiv 2411.12858), grey-box features and more",
    access="grey box, with the base model and known members",
    cost="all queries of calibrated, clid, pia, sima and pfami",
    asks=(
        ("errors", ON), ("errors", OFF), ("errors_null", ON), ("errors_reduced", ON), ("crops", ON),
        ("pia", ON), ("sima", ON),
    ),
    needs=("labels",),
    suite="standard",
)  # fmt: skip
def cdi(bank: Bank) -> np.ndarray:
    """The signals of many attacks, weighted by a logistic regression that learns from labelled pictures."""
    return bank.crossfit(cdi_features(bank))


def cdi_features(bank: Bank) -> np.ndarray:
    """Features (N, 12), or (N, 16) with captions.

    4 errors and 4 gains over the base, by timestep (the paper's multiple loss; it has no base); PIA
    and PIAN; SimA; PFAMI; CLiD's 4 differences. The paper's two white-box features (gradient masking
    and noise optimisation) and its SecMI are left out for their price.
    """
    columns = [
        binned(errors(bank), bank.layout),
        binned(gain(bank), bank.layout),
        log(bank.of("pia", ON)),
        log(bank.of("sima", ON))[:, None],
        pfami(bank)[:, None],
    ]
    if bank.captions:
        columns.append(discrepancies(bank))
    return np.concatenate(columns, axis=1)
