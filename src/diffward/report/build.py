"""From an audit's figures to the report: report.json, report.html and scores.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from diffward.errors import InputError
from diffward.files import write_json, write_text
from diffward.membership.statistics import p_values
from diffward.report.advice import training_methods
from diffward.report.drawn import Drawn
from diffward.report.html import render_report
from diffward.report.schema import FULL_MODEL, SCHEMA, Leak, Membership, Question, Subject
from diffward.report.verdict import (
    best_attack,
    membership_level,
    membership_question,
    metadata_question,
    not_run_question,
    overall,
)

SCORES_FILE = "scores.csv"


class PerImage(TypedDict):
    """One entry for each picture, in one order; `scores` by attack, higher = member.

    `thumbnails`: data URIs (data:image/...) or None, shown in the page only. `drawn`: what was drawn from the weights, too.
    """

    file: Sequence[str]
    sha256: Sequence[str]
    member: Sequence[bool]
    scores: Mapping[str, Sequence[float]]
    thumbnails: NotRequired[Sequence[str | None]]
    drawn: NotRequired[Sequence[Drawn]]


def build_report(
    subject: Mapping[str, Any],
    leaks: Sequence[Mapping[str, Any]] = (),
    membership: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    questions: Sequence[Question] = (),
) -> dict[str, Any]:
    """The report as plain JSON values; keeps `schema.validate_report`.

    subject     keys of `schema.Subject`, others are dropped (an `inspect --json` dict will do); of a full model
                also `folder`, whether it is one
    leaks       [{key, reveals, category?}], as `inspect` finds them
    membership  keys of `schema.Membership` but `best` and `per_image`; `attacks` is {NAME:
                {**statistics.summarise(...), p_value, p_holm, access, queries_per_image, controls}},
                empty if none could be run; None if no pictures were given
    provenance  {diffward, torch, diffusers, device, seeds, wall_seconds, config}; paths and numpy
                values are turned into strings and numbers
    questions   further answers (identity, copies, ...), as `schema.Question`
    """
    plain_leaks: list[Leak] = plain(list(leaks))
    kind = "lora"
    if subject.get("format") == FULL_MODEL:
        kind = "folder" if subject.get("folder") else "file"
    answers = [metadata_question(plain_leaks, kind)]
    found: Membership | None = None
    if membership and membership["attacks"]:
        found = _membership(membership)
        level = membership_level(found["attacks"][found["best"]], len(found["attacks"]))
        methods = training_methods() if level != "none_shown" else []
        answers.append(membership_question(found, subject.get("rank"), methods))
    elif membership:
        answers.append(not_run_question(membership["skipped"]))
    answers += questions
    return {
        "schema": SCHEMA,
        "subject": plain({key: subject.get(key) for key in Subject.__annotations__}),
        "overall": overall(answers, kind),
        "questions": answers,
        "leaks": plain_leaks,
        "membership": found,
        "provenance": plain(provenance or {}),
    }


def write_report(
    report: Mapping[str, Any], per_image: PerImage | None, out: str | Path
) -> tuple[Path, Path]:
    """Write scores.csv (if there are scores), report.json and report.html; return the last two.

    Raises InputError if the columns of `per_image` differ in length or lack an attack.
    """
    out = Path(out)
    rarity = None
    if report["membership"] and per_image is None:
        raise InputError("a report with membership figures needs the scores of the pictures")
    scores = None
    if per_image is not None and report["membership"]:
        rarity = _rarity(report, per_image)
        scores = scores_csv(per_image, rarity)
    page = render_report(report, per_image, rarity)
    if scores is not None:
        write_text(out / SCORES_FILE, scores)
    write_json(out / "report.json", report)
    write_text(out / "report.html", page)
    return out / "report.html", out / "report.json"


def scores_csv(per_image: PerImage, rarity: Sequence[float]) -> str:
    """CSV text: file, sha256, member (1 or 0), one column an attack, p_value of the best attack."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = list(per_image["scores"])
    writer.writerow(["file", "sha256", "member", *names, "p_value"])
    for index, file in enumerate(per_image["file"]):
        scores = [repr(float(per_image["scores"][name][index])) for name in names]
        row = [_cell(file), per_image["sha256"][index], int(per_image["member"][index])]
        writer.writerow([*row, *scores, f"{rarity[index]:.6g}"])
    return buffer.getvalue()


def plain(value: Any) -> Any:
    """`value` with paths as strings, arrays and tuples as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def _membership(given: Mapping[str, Any]) -> Membership:
    kept = Membership.__annotations__
    found: dict[str, Any] = plain({key: value for key, value in given.items() if key in kept})
    best = best_attack(found["attacks"])
    return cast(Membership, {**found, "best": best, "per_image": SCORES_FILE})


def _rarity(report: Mapping[str, Any], per_image: PerImage) -> list[float]:
    """p-value of each picture under the best attack, read from the side on which members stand out."""
    size = len(per_image["file"])
    columns = {"sha256": per_image["sha256"], "member": per_image["member"], **per_image["scores"]}
    for name, column in columns.items():
        if len(column) != size:
            raise InputError(f"{len(column)} entries of {name} for {size} pictures")
    best = report["membership"]["best"]
    if best not in per_image["scores"]:
        raise InputError(f"there are no scores of the attack {best!r}")
    scores = np.asarray(per_image["scores"][best], dtype=np.float64)
    sign = 1 if report["membership"]["attacks"][best]["auc"] >= 0.5 else -1
    values: list[float] = p_values(sign * scores, per_image["member"]).tolist()
    return values


def _cell(text: str) -> str:
    """A file name that a spreadsheet will not run as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
