"""`--fail-above SPEC`: a limit that makes an audit end with exit code 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from diffward.errors import InputError
from diffward.membership.statistics import FPR_GRID
from diffward.report.evidence import HOLM, p_words
from diffward.report.schema import LEVELS, Level
from diffward.report.verdict import rank

MOST_LINES = 3


@dataclass(frozen=True)
class Gate:
    """A limit on `measure`: "auc", "tpr@FPR" or "level"; `limit` is a number or a level."""

    measure: str
    limit: float | str

    def crossed(self, report: Mapping[str, Any]) -> list[str]:
        """Why the report is above the limit, one line each; empty if it is not.

        Strictly above counts: auc=0.6 passes at 0.6, level=medium passes at medium. A gate fails
        closed: figures that are missing and a refused claim cross it too.
        """
        if self.measure == "level":
            return self._level(report)
        membership = report.get("membership")
        if not membership:
            return [f"{self.measure}: the report has no membership figures to judge"]
        question = next((q for q in report["questions"] if q["id"] == "membership"), None)
        if question and question["claim"] == "refused":
            return [f"{self.measure}: {_refused(report)}"]
        if self.measure == "auc":
            values = {name: a["auc_signfree"] for name, a in membership["attacks"].items()}
        else:
            key = self.measure.removeprefix("tpr@")
            values = {name: a["tpr_at_fpr"].get(key) for name, a in membership["attacks"].items()}
        known = {name: value for name, value in values.items() if value is not None}
        if not known:
            return [f"{self.measure}: too few non-members for this figure"]
        above = sorted(
            (name for name, value in known.items() if value > cast(float, self.limit)),
            key=lambda name: -cast(float, known[name]),
        )
        lines = [
            f"{self.measure} of attack {name} is {known[name]:.3f}, above {self.limit}"
            + (_luck(membership["attacks"][name]) if self.measure == "auc" else "")
            for name in above[:MOST_LINES]
        ]
        if len(above) > MOST_LINES:
            lines.append(f"{self.measure}: {len(above) - MOST_LINES} more attacks are above it")
        return lines

    def _level(self, report: Mapping[str, Any]) -> list[str]:
        found = []
        for question in report["questions"]:
            if question["claim"] == "refused":
                found.append(f"{question['id']}: {_refused(report)}")
            elif rank(question["level"]) > rank(cast(Level, self.limit)):
                found.append(f"{question['id']} is {question['level']}, above {self.limit}")
        return found


def _refused(report: Mapping[str, Any]) -> str:
    why = "a control failed" if report.get("membership") else "no attack could be run"
    return f"no claim could be made ({why})"


def _luck(attack: Mapping[str, Any]) -> str:
    """A word of caution where the figure may be the best of many tries."""
    p_value = attack.get("p_holm")
    if p_value is None or p_value < HOLM:
        return ""
    return (
        f", though that may be luck ({p_words(p_value)}): more pictures or fewer attacks would tell"
    )


def parse_gate(spec: str) -> Gate:
    """`auc=0.6` (sign-free, any attack), `tpr@0.05=0.2` or `level=medium`.

    The first two judge estimates: many attacks on few pictures cross a low limit by luck alone, since
    that no such leak is there was not shown either. `level` allows for luck.

    Raises InputError, naming the forms that are understood, on anything else.
    """
    measure, _, limit = (part.strip().lower() for part in spec.partition("="))
    if measure == "level" and limit in LEVELS:
        return Gate("level", limit)
    measures = ["auc", *(f"tpr@{fpr}" for fpr in FPR_GRID)]
    try:
        number = float(limit)
    except ValueError:
        number = -1.0
    if measure in measures and 0 <= number <= 1:
        return Gate(measure, number)
    raise InputError(
        f"--fail-above {spec!r} is not understood; write {', '.join(f'{m}=0.6' for m in measures)} "
        f"(a number from 0 to 1) or level= one of {', '.join(LEVELS)}"
    )
