"""Every registered attack on one bank, with its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffward.membership import calibrated, loss  # noqa: F401  (registers the attacks)
from diffward.membership.attack import ATTACKS
from diffward.membership.bank import Bank
from diffward.membership.statistics import ChanceCheck, at_chance, summarise


def run_attacks(
    bank: Bank, is_member: np.ndarray, blind: ChanceCheck | None, *, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], Mapping[str, np.ndarray]]:
    """Run every attack.

    Args:
        bank: errors of N pictures.
        is_member: bool (N,).
        blind: the blind control's outcome, one for all attacks; None if it was not run.

    Returns:
        ({attack: figures as in `report.schema.Attack`}, {attack: scores (N,)}).
    """
    figures, scores = {}, {}
    base = bank.as_base()
    pairs = bank.errors.shape[-1]
    for entry in ATTACKS:
        s = entry.obj(bank)
        control = entry.obj(base)
        check = at_chance(control[is_member], control[~is_member])
        scores[entry.name] = s
        figures[entry.name] = {
            **summarise(s[is_member], s[~is_member], seed=seed),
            "access": entry.access,
            "queries_per_image": entry.extra["queries"](pairs),
            "controls": {
                "base_model_auc": check.auc,
                "base_model_ok": check.ok,
                "base_model_reason": check.reason,
                "blind_auc": blind.auc if blind else None,
                "blind_ok": blind.ok if blind else None,
                "blind_reason": blind.reason if blind else None,
            },
        }
    return figures, scores
