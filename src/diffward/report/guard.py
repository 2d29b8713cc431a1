"""guard.html and guard.json: what attackers still can do with a guarded base."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.errors import InputError
from diffward.files import write_json, write_text
from diffward.report.guard_verdict import number, percent, verdict
from diffward.report.html import environment, pretty

if TYPE_CHECKING:
    from diffward.guard.evaluate import Evaluation

PAGE, DATA = "guard.html", "guard.json"
DOMAIN_WORDS = {"illegal": "The forbidden domain", "innocent": "The allowed domain"}
COLUMNS, SIDE = 8, 96  # pictures in a row of a grid, and their side in pixels at most
_PNG = b"\x89PNG\r\n\x1a\n"


def write_guard_page(
    evaluation: Evaluation,
    out: str | Path,
    *,
    title: str = "",
    mask_plot: str | Path | None = None,
    mask_facts: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write `guard.html` and `guard.json` to the folder `out`.

    The JSON is `evaluation.data` with `verdict`, `mask` and `provenance`; the page shows the same figures and
    loads nothing.

    Args:
        title: of the page; the base's name by default.
        mask_plot: PNG of where the mask freezes (`guard.plot.draw_mask`).
        mask_facts: what the page says of the mask, {words: value}.
        provenance: versions, hardware, config.

    Returns:
        The page and the JSON.

    Raises:
        InputError: pictures of the evaluation are gone, or `mask_plot` is no PNG.
    """
    data = {
        **evaluation.data, "verdict": verdict(evaluation.data), "mask": dict(mask_facts or {}),
        "provenance": dict(provenance or {}),
    }  # fmt: skip
    page = environment().get_template("guard.html.j2").render(
        data=data, title=title or f"{data['base']['name']}, guarded", verdict=data["verdict"],
        tables=[_table(data, domain) for domain in data["domains"]],
        grids=[g for domain in data["domains"] for g in _grids(evaluation, domain)],
        plot=_plot(mask_plot), guards=_guards(data), details={k: pretty(v) for k, v in data["provenance"].items()},
        settings=pretty(data["settings"]), attackers=data["attackers"],
    )  # fmt: skip
    folder = Path(out)
    write_json(folder / DATA, data)
    write_text(folder / PAGE, page)
    return folder / PAGE, folder / DATA


# --- tables ------------------------------------------------------------------------------------------


def share(figure: Mapping[str, Any] | None) -> str:
    """84 % [80, 88]."""
    return _with_ends(figure, percent, lambda v: number(100 * v))


def points(figure: Mapping[str, Any] | None) -> str:
    """−72 [−80, −64], in points of a hundred."""
    return _with_ends(figure, _signed, _signed)


def decimals(figure: Mapping[str, Any] | None) -> str:
    """0.123 [0.100, 0.146]."""
    return _with_ends(figure, _figures, _figures)


def _with_ends(
    figure: Mapping[str, Any] | None, value: Callable[[float], str], end: Callable[[float], str]
) -> str:
    if figure is None:
        return "–"
    low, high = figure["ci95"]
    return f"{value(figure['value'])} [{end(low)}, {end(high)}]"


def _signed(share: float) -> str:
    return number(100 * share, sign="+")


def _figures(number: float) -> str:
    """Three decimals; none where it is large."""
    return _three(number) if abs(number) < 100 else f"{number:,.0f}"


def _three(value: float) -> str:
    return number(value, 3)


def _plain(value: float | None, words: Callable[[float], str]) -> str:
    return "–" if value is None else words(value)


# Title, key of the summary, how it is written.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Identity match", "identity_match", share),
    ("against no guard", "vs_none", points),
    ("against random", "vs_random", points),
    ("Gain kept", "gain_kept", share),
    ("Held-out loss", "held_out_loss", lambda v: _plain(v, _three)),
    ("Captions kept", "caption_agreement", share),
    ("KID", "kid", decimals),
    ("KID against no guard", "kid_vs_none", decimals),
    ("FID", "fid", lambda v: _plain(v, lambda x: f"{x:.1f}")),
    ("Memory", "memory_ratio", lambda v: _plain(v, lambda x: f"{x:.2f}×")),
    ("Time a step", "time_ratio", lambda v: _plain(v, lambda x: f"{x:.2f}×")),
)


def _table(data: Mapping[str, Any], domain: str) -> dict[str, Any]:
    """Columns that have a figure, and rows by attacker."""
    rows = [row for row in data["summary"] if row["domain"] == domain]
    columns = [c for c in _COLUMNS if any(row[c[1]] is not None for row in rows)]
    groups = []
    for attacker in dict.fromkeys(row["attacker"] for row in rows):
        own = [row for row in rows if row["attacker"] == attacker]
        groups.append({
            "attacker": attacker,
            "rows": [
                {
                    "guard": row["guard"], "same_as": row["same_as"],
                    "cells": [words(row[key]) for _, key, words in columns],
                }
                for row in own
            ],
        })  # fmt: skip
    return {
        "domain": domain, "title": DOMAIN_WORDS.get(domain, domain), "columns": [c[0] for c in columns],
        "groups": groups, "facts": data["domains"][domain],
    }  # fmt: skip


def _guards(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line a guard; of one that every seed has its own of, the mean shares."""
    found = []
    for name in dict.fromkeys(guard["name"] for guard in data["guards"]):
        own = [guard for guard in data["guards"] if guard["name"] == name]
        found.append({
            "name": name, "masks": len(own) if own[0]["seed"] is not None else 1,
            **{
                key: percent(float(np.mean([guard[key] for guard in own])), 1)
                for key in ("tensor_share", "parameter_share")
            },
            "edited": own[0]["edited_tensors"],
            "facts": ", ".join(f"{k} {v}" for k, v in own[0]["facts"].items()),
        })  # fmt: skip
    return found


# --- pictures ----------------------------------------------------------------------------------------


def _grids(evaluation: Evaluation, domain: str) -> list[dict[str, Any]]:
    """A grid an attacker: a row a guard, as many columns as fit a subject (or a column a prompt), of the first seed."""
    data = evaluation.data
    facts, seed = data["domains"][domain], data["settings"]["seeds"][0]
    subjects = facts["subjects"][:COLUMNS]
    first = [row for row in data["rows"] if row["domain"] == domain and row["seed"] == seed]
    each = COLUMNS
    if subjects:
        each = min(COLUMNS // len(subjects), first[0]["shape"][0] // len(facts["subjects"]))
    grids = []
    for attacker in dict.fromkeys(row["attacker"] for row in first):
        rows = []
        if facts["reference"]:
            real = evaluation.pictures(facts["reference"])[: len(subjects)]
            blank = np.full_like(real[0], 255)
            rows.append(
                (
                    "real pictures",
                    np.stack([one if not i else blank for one in real for i in range(each)]),
                )
            )
        for row in (r for r in first if r["attacker"] == attacker):
            pictures = evaluation.pictures(row)
            own = np.split(pictures, len(facts["subjects"])) if subjects else [pictures]
            rows.append((row["guard"], np.concatenate([some[:each] for some in own[:COLUMNS]])))
        wide = max(len(pictures) for _, pictures in rows)
        grids.append({
            "title": f"{DOMAIN_WORDS.get(domain, domain)}: {attacker}", "domain": domain, "attacker": attacker,
            "columns": [
                f"{subjects[i // each]} {i % each + 1}" if subjects else str(i + 1) for i in range(wide)
            ],
            "rows": [
                {"name": name, "pictures": [thumbnail(one) for one in pictures]} for name, pictures in rows
            ],
        })  # fmt: skip
    return grids


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data URI, no larger than `SIDE`."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plot(path: str | Path | None) -> str:
    if path is None:
        return ""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the mask's plot cannot be read ({error.strerror})") from error
    if not content.startswith(_PNG):
        raise InputError(f"{path}: the mask's plot is no PNG")
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
