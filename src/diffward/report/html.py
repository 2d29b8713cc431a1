"""report.html: one self-contained page. Everything but the plots goes through autoescaping."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.report.evidence import (
    HOLM,
    count_words,
    epsilon_words,
    p_number,
    passes_words,
    skipped_words,
    together_words,
)
from diffward.report.plots import SERIES, histogram_svg, roc_svg
from diffward.report.schema import LEVELS
from diffward.report.verdict import rank, ranked_attacks, worst_base_control

if TYPE_CHECKING:
    from jinja2 import Environment

    from diffward.report.build import PerImage

TEMPLATES = Path(__file__).parent / "templates"
MAX_ROWS = 400
COLUMNS = 4  # attacks with a column in the table of pictures; scores.csv has all
EXPOSED = 12
LEVEL_WORDS = {
    "none_shown": "None shown",
    "low": "Low",
    "medium": "Medium",
    "high": "High",
    "critical": "Critical",
    None: "No claim",
}
QUESTION_WORDS = {
    "metadata": "What does the file itself say?",
    "membership": "Can someone tell which pictures it was trained on?",
    "identity": "Can someone tell who is in the training pictures?",
    "copies": "Does it draw copies of training pictures?",
    "prompt": "Can the training words be read back?",
    "dataset_size": "Can someone tell how many pictures were used?",
}


def environment() -> Environment:
    """The jinja2 environment of both pages; always autoescapes, fails on names that are missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(figure=figure, interval=interval, pretty=pretty, p_number=p_number)
    env.globals.update(levels=LEVELS, level_words=LEVEL_WORDS, question_words=QUESTION_WORDS)
    return env


def script_hash(name: str) -> str:
    """CSP source of an inline script, so that the browser runs this one and no other."""
    digest = hashlib.sha256((TEMPLATES / name).read_bytes()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def render_report(
    report: Mapping[str, Any], per_image: PerImage | None, rarity: Sequence[float] | None
) -> str:
    """The page of a report; `rarity` holds the p-value of each picture of `per_image`."""
    context: dict[str, Any] = {"report": report, "script_csp": script_hash("sort.js")}
    context["refused"] = [q for q in report["questions"] if q["claim"] == "refused"]
    # Of what could not be claimed first, then of the worst.
    context["lead"] = _lead(report)
    worst = sorted(report["questions"], key=lambda q: -rank(q["level"]) if q["level"] else -9)
    context["advice"] = list(dict.fromkeys(a for q in worst for a in q["advice"]))
    context.update(
        plots=None,
        rows=[],
        hidden_rows=0,
        columns=[],
        exposed=[],
        series=SERIES,
        found=None,
        drawn=[],
    )
    if per_image is not None:
        context["drawn"] = _drawn(per_image.get("drawn") or [])
    if report["membership"]:
        context["found"] = membership_view(report)
        names = list(context["found"]["attacks"])
        if per_image is not None and rarity is not None:
            columns = [name for name in names if name in per_image["scores"]][:COLUMNS]
            rows = _rows(report["membership"], per_image, rarity, columns)
            context["plots"] = _plots(names, per_image)
            context["rows"], context["hidden_rows"] = rows[:MAX_ROWS], max(0, len(rows) - MAX_ROWS)
            context["columns"] = columns
            if context["found"]["shown"]:
                context["exposed"] = [row for row in rows if row["member"]][:EXPOSED]
    return environment().get_template("report.html.j2").render(context)


def figure(value: float | None, digits: int = 2) -> str:
    """A number for reading, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(ends: Sequence[float] | None) -> str:
    """[low, high], or nothing."""
    return "" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def pretty(value: Any) -> str:
    """JSON for a folded block, or the text itself."""
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)


def safe_image(source: str | None) -> str | None:
    """The source if it is an embedded bitmap, else None: nothing is ever fetched."""
    kinds = ("png", "jpeg", "webp", "gif")
    if source and source.startswith(tuple(f"data:image/{kind};base64," for kind in kinds)):
        return source
    return None


def membership_view(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's section on membership shows: `report.membership`, sorted and put into words.

    Figures that have a box of their own are left out of `lines`. Boxes that rest on the attacks are
    left out where the claim is refused.
    """
    membership = report["membership"]
    question = next(q for q in report["questions"] if q["id"] == "membership")
    names = ranked_attacks(membership["attacks"])
    attacks = {name: membership["attacks"][name] for name in names}
    best = attacks[names[0]]
    refused = question["claim"] == "refused"
    # Of a refusal the headline has the first sentence, the rest says why.
    first, why = question["statement"], ""
    if refused:
        first, _, why = first.partition(". ")
        first += "."
    boxes = _boxes(membership, refused)
    luck = question["level"] == "none_shown" and not best["p_holm"] < HOLM
    said = {box["text"] for box in boxes}
    low = min(0.5, *(a["auc_ci95"][0] for a in attacks.values()))
    return {
        "question": question,
        "first": first,
        "why": why,
        "attacks": attacks,
        "best": best,
        "name": names[0],
        "refused": refused,
        "shown": question["level"] not in (None, "none_shown"),
        "luck": luck,
        "boxes": boxes,
        # The first line is about the AUC, which the section shows large.
        "lines": [e for e in question["evidence"][0 if luck else 1 :] if e not in said],
        "skipped": skipped_words(membership["skipped"]),
        "worst_base": worst_base_control(attacks),
        "failed_base": [n for n, a in attacks.items() if a["controls"]["base_model_ok"] is False],
        # The axis of the forest starts where there is something to see.
        "axis": min(0.4, max(0.0, np.floor(10 * low) / 10)),
    }


def _boxes(membership: Mapping[str, Any], refused: bool) -> list[dict[str, str]]:
    """{title, figure, text}: the figures beside the AUC that a reader should not miss."""
    boxes = []
    if exposure := membership["exposure"]:
        boxes.append(
            {
                "title": "Passes over each picture",
                "figure": f"≈ {count_words(exposure['passes'])}",
                "text": passes_words(exposure),
            }
        )
    if (together := membership["dataset_inference"]) and not refused:
        needed, shown = together["pictures_needed"], together["p_value"] < together["alpha"]
        enough = f"{needed} pictures" if needed else "shown"
        boxes.append(
            {
                "title": "The pictures as a set",
                "figure": enough if shown else "not shown",
                "text": together_words(together),
            }
        )
    if (epsilon := membership["epsilon"]) and not refused:
        known = epsilon["epsilon"] > 0
        boxes.append(
            {
                "title": "Epsilon, from coin flips",
                "figure": f"≥ {epsilon['epsilon']:.2f}" if known else "no bound",
                "text": epsilon_words(epsilon),
            }
        )
    return boxes


def _lead(report: Mapping[str, Any]) -> str | None:
    """The answer that the verdict rests on, where it is one about the weights; nothing is put before a refusal."""
    if any(q["claim"] == "refused" for q in report["questions"]):
        return None
    level = report["overall"]["level"]
    at_worst = [q for q in report["questions"] if q["level"] == level and level != "none_shown"]
    if any(q["id"] in ("membership", "metadata") for q in at_worst):
        return None
    return next((str(q["statement"]) for q in at_worst), None)


def _drawn(groups: Sequence[Any]) -> list[dict[str, Any]]:
    """Pictures drawn from the weights, with embedded bitmaps only."""
    return [
        {
            **group,
            "pairs": [
                {**pair, "drawn": safe_image(pair["drawn"]), "nearest": safe_image(pair["nearest"])}
                for pair in group["pairs"]
            ],
        }
        for group in groups
    ]


def _plots(names: Sequence[str], per_image: PerImage) -> dict[str, Any]:
    """ROC of the best attacks and histogram of the very best; `names` are sorted, best first."""
    member = np.asarray(per_image["member"], dtype=bool)
    curves = {}
    for name in [n for n in names if n in per_image["scores"]][:SERIES]:
        scores = np.asarray(per_image["scores"][name], np.float64)
        curves[name] = (scores[member], scores[~member])
    return {
        "roc": roc_svg(curves),
        "histogram": histogram_svg(*curves[names[0]]),
        "names": list(curves),
    }


def _rows(
    membership: Mapping[str, Any],
    per_image: PerImage,
    rarity: Sequence[float],
    columns: Sequence[str],
) -> list[dict[str, Any]]:
    """The pictures, most exposed first: by p-value, then by how far they stand out."""
    best = membership["best"]
    sign = 1 if membership["attacks"][best]["auc"] >= 0.5 else -1
    others = len(per_image["member"]) - sum(per_image["member"])
    thumbnails = per_image.get("thumbnails") or [None] * len(per_image["file"])
    rows = [
        {
            "file": file,
            "member": bool(per_image["member"][index]),
            "scores": [float(per_image["scores"][name][index]) for name in columns],
            "p": rarity[index],
            # Of a member: how many non-members score as high.
            "others": round(rarity[index] * (others + 1)) - 1,
            "order": sign * float(per_image["scores"][best][index]),
            "thumbnail": safe_image(thumbnails[index]),
        }
        for index, file in enumerate(per_image["file"])
    ]
    return sorted(rows, key=lambda row: (row["p"], -row["order"]))
