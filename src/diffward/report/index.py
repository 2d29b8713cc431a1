"""index.html: several audited LoRAs side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from diffward.errors import InputError
from diffward.files import write_text
from diffward.report.html import environment, safe_image


class Picture(TypedDict):
    """`src` is a data URI or a relative path; `alt` says what it shows to those who cannot see it."""

    src: str
    alt: str
    caption: NotRequired[str]


class ImageGroup(TypedDict):
    """A titled grid, such as "Training pictures" or "What it draws"."""

    title: str
    pictures: Sequence[Picture]


class Card(TypedDict):
    """One audited LoRA. `report` is the dict of `build_report`; `report_path` a relative path."""

    name: str
    subtitle: NotRequired[str]
    report: Mapping[str, Any]
    report_path: str
    numbers: NotRequired[Sequence[tuple[str, str]]]
    images: NotRequired[Sequence[ImageGroup]]


def write_index(
    title: str,
    intro: Sequence[str],
    cards: Sequence[Card],
    out: str | Path,
    outro: Sequence[str] = (),
    images: Sequence[ImageGroup] = (),
) -> Path:
    """Write the page to the file `out`: verdict, AUC with interval, numbers, image grids, links.

    `intro` and `outro` are paragraphs of plain text; `images` are grids that belong to all cards. Raises InputError for links or pictures that
    are neither relative paths nor embedded bitmaps: the page loads nothing from outside its folder.
    """
    views = [_view(card) for card in cards]
    page = environment().get_template("index.html.j2")
    grids = [_group(group) for group in images]
    write_text(out, page.render(title=title, intro=intro, cards=views, outro=outro, images=grids))
    return Path(out)


def _view(card: Card) -> dict[str, Any]:
    report = card["report"]
    membership = report["membership"]
    question = next((q for q in report["questions"] if q["id"] == "membership"), None)
    return {
        "name": card["name"],
        "subtitle": card.get("subtitle", ""),
        "overall": report["overall"],
        "membership": question,
        "attack": membership["best"] if membership else None,
        "figures": membership["attacks"][membership["best"]] if membership else None,
        "numbers": card.get("numbers", ()),
        "images": [_group(group) for group in card.get("images", ())],
        "link": _local(card["report_path"]),
    }


def _group(group: ImageGroup) -> dict[str, Any]:
    return {**group, "pictures": [{**p, "src": _local(p["src"])} for p in group["pictures"]]}


def _local(source: str) -> str:
    """A relative path or an embedded bitmap; anything else could reach outside or run script."""
    if safe_image(source):
        return source
    path = source.replace("\\", "/")
    if re.match(r"[a-zA-Z][\w+.-]*:", path) or path.startswith("/"):
        raise InputError(f"{source[:80]!r}: links of a page must be relative paths")
    return path
