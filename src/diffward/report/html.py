"""report.html: one self-contained page. Everything but the plots goes through autoescaping."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.report.plots import SERIES, forest_svg, histogram_svg, roc_svg
from diffward.report.schema import LEVELS

if TYPE_CHECKING:
    from jinja2 import Environment

    from diffward.report.build import PerImage

TEMPLATES = Path(__file__).parent / "templates"
MAX_ROWS = 400
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
    env.filters.update(figure=figure, interval=interval, pretty=pretty)
    env.globals.update(levels=LEVELS, level_words=LEVEL_WORDS, question_words=QUESTION_WORDS)
    return env


def script_hash(name: str) -> str:
    """CSP source of an inline script, so that the browser runs this one and no other."""
    digest = hashlib.sha256((TEMPLATES / name).read_bytes()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def render_report(
    report: Mapping[str, Any], per_image: PerImage | None, exposure: Sequence[float] | None
) -> str:
    """The page of a report; `exposure` holds the p-value of each picture of `per_image`."""
    context: dict[str, Any] = {"report": report, "script_csp": script_hash("sort.js")}
    context["plots"] = None
    context["rows"], context["hidden_rows"], context["score_names"] = [], 0, []
    context["advice"] = list(dict.fromkeys(a for q in report["questions"] for a in q["advice"]))
    if report["membership"] and per_image is not None and exposure is not None:
        context["plots"] = _plots(report["membership"], per_image)
        rows = _rows(report["membership"], per_image, exposure)
        context["rows"], context["hidden_rows"] = rows[:MAX_ROWS], max(0, len(rows) - MAX_ROWS)
        context["score_names"] = list(per_image["scores"])
    context["series"] = SERIES
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


def _plots(membership: Mapping[str, Any], per_image: PerImage) -> dict[str, Any]:
    member = np.asarray(per_image["member"], dtype=bool)
    scores = {name: np.asarray(values, np.float64) for name, values in per_image["scores"].items()}
    attacks, best = membership["attacks"], membership["best"]
    # Best first; its controls beneath it, since they are what it must be compared with.
    names = sorted(attacks, key=lambda name: (name != best, -attacks[name]["auc_signfree"]))
    rows = [
        {"label": n, "value": attacks[n]["auc"], "ci95": attacks[n]["auc_ci95"], "kind": "attack"}
        for n in names
    ]
    for key, label in (("base_model_auc", "control: base model"), ("blind_auc", "control: blind")):
        if (value := attacks[best]["controls"][key]) is not None:
            rows.append({"label": label, "value": value, "ci95": None, "kind": "control"})
    curves = {
        name: (scores[name][member], scores[name][~member]) for name in names if name in scores
    }
    return {
        "forest": forest_svg(rows),
        "roc": roc_svg(curves),
        "histogram": histogram_svg(*curves[best]),
        "names": list(curves),
        "order": names,
    }


def _rows(
    membership: Mapping[str, Any], per_image: PerImage, exposure: Sequence[float]
) -> list[dict[str, Any]]:
    """The pictures, most exposed first: by p-value, then by how far they stand out."""
    best = membership["best"]
    sign = 1 if membership["attacks"][best]["auc"] >= 0.5 else -1
    thumbnails = per_image.get("thumbnails") or [None] * len(per_image["file"])
    rows = [
        {
            "file": file,
            "sha256": per_image["sha256"][index],
            "member": bool(per_image["member"][index]),
            "scores": [float(values[index]) for values in per_image["scores"].values()],
            "p": exposure[index],
            "order": sign * float(per_image["scores"][best][index]),
            "thumbnail": safe_image(thumbnails[index]),
        }
        for index, file in enumerate(per_image["file"])
    ]
    return sorted(rows, key=lambda row: (row["p"], -row["order"]))
