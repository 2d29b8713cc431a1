"""What an attack is, and the registry of them: a score a picture, higher = member."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffward.membership.bank import Bank
from diffward.membership.layout import Layout
from diffward.membership.probe import PROBES
from diffward.registry import Entry, Registry

Attack = Callable[[Bank], np.ndarray]
"""Scores (N,) float64, higher = member. It asks the bank for no more than its entry's `asks`."""

ATTACKS: Registry[Attack] = Registry("attack")
"""Extra fields of an entry:

asks    tuple of (probe, model): what it looks at
needs   tuple out of "captions", "labels" (learns from labelled pictures, cross-fitted), "shadows"
suite   "standard" (every audit) or "thorough" (on demand: dear, or for comparison only)
queries function of `Layout`: its own denoiser evaluations, where a probe answers more than it needs
"""


def queries(entry: Entry[Attack], layout: Layout) -> int:
    """Denoiser evaluations a picture that this attack would make alone."""
    if own := entry.extra.get("queries"):
        return int(own(layout))
    return sum(PROBES[probe].extra["evaluations"](layout) for probe, _ in set(entry.extra["asks"]))
