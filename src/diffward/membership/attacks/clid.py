"""How much the caption helps the model: it overfits to captions more than to pictures alone."""

from __future__ import annotations

import numpy as np

from diffward.membership.attack import ATTACKS
from diffward.membership.bank import ON, Bank
from diffward.membership.captions import SHARES
from diffward.membership.features import discrepancies, likelihood
from diffward.membership.layout import Layout

_PAPER = "Zhai et al. 2024 (arXiv 2405.14800)"
_ASKS = (("errors", ON), ("errors_null", ON), ("errors_reduced", ON))
ALPHA = 0.9  # the authors find it on a shadow model; the published value is taken over


def _queries(layout: Layout) -> int:
    """Caption, no caption and the reduced ones, each at the middle pairs."""
    return (2 + len(SHARES)) * len(layout.middle)


@ATTACKS.register(
    "clid", paper=f"{_PAPER}, CLiD_th", access="grey box, with the captions", cost="20 queries",
    asks=_ASKS, needs=("captions",), suite="standard", queries=_queries,
)  # fmt: skip
def clid(bank: Bank) -> np.ndarray:
    """A member's error rises most when its caption is cut: s = a S(mean_i D_i) + (1 - a) S(L), a = 0.9.

    D_i = mean [l(c*_i) - l(c)] over the pairs near t = 450, c*_i the caption without its 30, 50, 70 %
    most telling words, and no caption; L = -mean l(c). S is the robust scale (x - median) / IQR.
    """
    return ALPHA * robust(discrepancies(bank).mean(axis=1)) + (1 - ALPHA) * robust(likelihood(bank))


@ATTACKS.register(
    "clid_vec", paper=f"{_PAPER}, CLiD_vec", access="grey box, with the captions and known members",
    cost="20 queries", asks=_ASKS, needs=("captions", "labels"), suite="standard", queries=_queries,
)  # fmt: skip
def clid_vec(bank: Bank) -> np.ndarray:
    """A classifier of CLiD's differences and the likelihood: V = (D_1 … D_k, L).

    Logistic regression, cross-fitted. The authors take XGBoost, trained on the hundreds of pictures
    of a shadow model; on tens of pictures trees of five features that all point the same way lose.
    """
    return bank.crossfit(np.column_stack([discrepancies(bank), likelihood(bank)]))


def robust(values: np.ndarray) -> np.ndarray:
    """(values - median) / IQR (eq. 16; the text says mean, the authors' code takes the median).

    Over all pictures that are judged, members or not: no label is needed.
    """
    low, middle, high = np.percentile(values, [25, 50, 75])
    return (values - middle) / (high - low if high > low else 1.0)
