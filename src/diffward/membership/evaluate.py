"""The registered attacks on one bank, with their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffward.errors import InputError
from diffward.membership import attacks as _attacks  # noqa: F401  (registers them)
from diffward.membership.attack import ATTACKS, Attack, queries
from diffward.membership.bank import Bank
from diffward.membership.crossfit import crossfit_inflation
from diffward.membership.probe import OFF, PROBES
from diffward.membership.statistics import (
    ChanceCheck,
    at_chance,
    auc,
    holm,
    membership_p_value,
    summarise,
)
from diffward.registry import Entry

SUITES = ("standard", "thorough")


@dataclass
class Evaluation:
    """What the attacks found.

    Attributes:
        figures: {attack: figures as in `report.schema.Attack`}.
        scores: {attack: (N,)}, higher = member.
        skipped: {attack: why it was not run}.
        made: denoiser evaluations a picture that were needed, the base control's among them.
        alone: what they would have been, had each attack asked for itself.
    """

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    made: float = 0.0
    alone: float = 0.0


def chosen_attacks(wanted: str = "standard") -> list[Entry[Attack]]:
    """Entries of a suite ("thorough" has all), or of names with commas between.

    Raises:
        InputError: a name is not known.
    """
    if wanted in SUITES:
        return [e for e in ATTACKS if wanted == "thorough" or e.extra["suite"] == wanted]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise InputError("--attacks: name at least one attack, or standard or thorough")
    return [ATTACKS[name] for name in names]


def wants_factors(entries: Sequence[Entry[Attack]]) -> bool:
    """Whether any of these attacks takes gradients along the adapter's factors."""
    asked = {probe for entry in entries for probe, _ in entry.extra["asks"]}
    return any(PROBES[probe].extra.get("factors") for probe in asked)


def missing(entry: Entry[Attack], bank: Bank) -> str | None:
    """Why an attack cannot be run on this bank; None where it can."""
    needs = {*entry.extra.get("needs", ()), *(("factors",) if wants_factors([entry]) else ())}
    if reason := next((why for need, why in bank.absent.items() if need in needs), None):
        return reason
    if "captions" in needs and not bank.captions:
        return "needs captions"
    if "shadows" in needs and bank.shadows is None:
        return "needs shadow LoRAs (--shadows)"
    return None


def run_attacks(
    bank: Bank,
    blind: ChanceCheck | None,
    *,
    entries: Sequence[Entry[Attack]] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Run attacks, each on the adapted model and, as control, on the base alone.

    Controls are judged as a family: all of them together are off chance by luck in at most one of a
    hundred honest audits.

    Args:
        blind: the blind control's outcome, one for all attacks; None if it was not run.
        entries: the standard suite by default.
    """
    found = Evaluation()
    entries = list(chosen_attacks() if entries is None else entries)
    for entry in entries:
        if reason := missing(entry, bank):
            found.skipped[entry.name] = reason
    runnable = [e for e in entries if e.name not in found.skipped]
    member, base = bank.is_member, bank.as_base()
    groups = _copies(bank)
    p_values = {}
    for entry in runnable:
        scores, control = entry.obj(bank), entry.obj(base)
        learns = "labels" in entry.extra.get("needs", ())
        inflation = crossfit_inflation(len(bank)) if learns else 1.0
        check = at_chance(
            control[member], control[~member], family=len(runnable), inflation=inflation
        )
        found.scores[entry.name] = scores
        p_value = membership_p_value(scores[member], scores[~member], inflation=inflation)
        if learns:  # it knows the sign it learned: to be wrong is luck, not a leak
            above = auc(scores[member], scores[~member]) >= 0.5
            p_value = p_value / 2 if above else 1 - p_value / 2
        p_values[entry.name] = p_value
        found.figures[entry.name] = {
            **summarise(scores[member], scores[~member], seed, groups, inflation=inflation),
            "p_value": p_values[entry.name],
            "access": entry.access,
            "queries_per_image": queries(entry, bank.layout),
            "controls": _controls(check, blind),
        }
    for name, value in holm(p_values).items():
        found.figures[name]["p_holm"] = value
    each = [_asked(entry, bank) for entry in runnable]
    found.made = _cost(set().union(*each), bank)
    # An attack that needs a part of a probe only asks the base for as much again.
    found.alone = sum(
        2.0 * queries(entry, bank.layout) if "queries" in entry.extra else _cost(asked, bank)
        for entry, asked in zip(runnable, each, strict=True)
    )
    return found


def _copies(bank: Bank) -> tuple[np.ndarray, np.ndarray] | None:
    """Group labels of members and of others, if any pictures are near-duplicates."""
    if bank.groups is None or len(np.unique(bank.groups)) == len(bank):
        return None
    return bank.groups[bank.is_member], bank.groups[~bank.is_member]


def _asked(entry: Entry[Attack], bank: Bank) -> set[tuple[str, str]]:
    """What an attack and its base control ask: the control puts the adapted model's questions to the base."""
    captions = {"errors_null", "errors_reduced"}
    asks = {a for a in entry.extra["asks"] if bank.captions or a[0] not in captions}
    return asks | {(probe, OFF) for probe, _ in asks}


def _cost(asked: set[tuple[str, str]], bank: Bank) -> float:
    return float(sum(PROBES[probe].extra["evaluations"](bank.layout) for probe, _ in asked))


def _controls(check: ChanceCheck, blind: ChanceCheck | None) -> Mapping[str, Any]:
    return {
        "base_model_auc": check.auc,
        "base_model_ok": check.ok,
        "base_model_reason": check.reason,
        "blind_auc": blind.auc if blind else None,
        "blind_ok": blind.ok if blind else None,
        "blind_reason": blind.reason if blind else None,
    }
