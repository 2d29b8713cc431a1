"""Numbers about a picture that several attacks are made of. No label enters any of them."""

from __future__ import annotations

import numpy as np

from diffward.membership.bank import OFF, ON, Bank
from diffward.membership.layout import Layout

BINS = 4  # of the timesteps
TINY = 1e-30


def log(values: np.ndarray) -> np.ndarray:
    """The logarithm; errors and norms are positive, unless an answer is exact."""
    return np.log(np.maximum(values, TINY))


def binned(values: np.ndarray, layout: Layout, bins: int = BINS) -> np.ndarray:
    """Means (N, bins) of values (N, K) over neighbouring timesteps, the least noisy first."""
    order = np.argsort(layout.timesteps, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return np.stack([values[:, part].mean(axis=1) for part in parts], axis=1)


def errors(bank: Bank) -> np.ndarray:
    """Log of the errors (N, K) with the adapter on."""
    return log(bank.of("errors", ON))


def gain(bank: Bank) -> np.ndarray:
    """Log of base error over error (N, K): what the adapter made easier, whatever the picture's scale."""
    return log(bank.of("errors", OFF)) - errors(bank)


def likelihood(bank: Bank) -> np.ndarray:
    """L (N,) = -mean l(c) over the middle pairs: CLiD, eq. 15."""
    return -bank.of("errors", ON)[:, bank.layout.middle].mean(axis=1)


def discrepancies(bank: Bank) -> np.ndarray:
    """D (N, k) = mean [l(c*) - l(c)] over the middle pairs, c* reduced captions, then none: CLiD, eq. 14.

    Needs captions.
    """
    reduced = bank.of("errors_reduced", ON).mean(axis=2)
    null = bank.of("errors_null", ON).mean(axis=1, keepdims=True)
    return np.concatenate([reduced, null], axis=1) + likelihood(bank)[:, None]


def gradient_sizes(bank: Bank) -> np.ndarray:
    """Log squared gradient norms (N, 4) of factor A and B, of kind GSA1 and GSA2 (`probes.gradients`)."""
    squares = bank.of("gradients", ON)
    return log(squares.sum(axis=1).reshape(len(squares), -1))
