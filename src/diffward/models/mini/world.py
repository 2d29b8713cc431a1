"""The procedural world: unlimited pictures of fictional people, logos and garments, with captions.

A picture is a pure function of (domain, attributes, seed); identity is known exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from diffward.models.mini.attributes import (
    DOMAINS,
    SCENE,
    Attributes,
    Person,
    caption,
    random_values,
)
from diffward.models.mini.portrait import draw_portrait
from diffward.models.mini.things import draw_garment, draw_logo, restyle

SIZE = 64
_SHARE = {"portrait": 0.6, "logo": 0.16, "garment": 0.24}
_SYLLABLES = [
    "ka",
    "vo",
    "mi",
    "ra",
    "zu",
    "te",
    "lo",
    "shi",
    "na",
    "bro",
    "qui",
    "den",
    "fal",
    "gor",
    "wix",
    "pel",
]


@dataclass(frozen=True)
class Drawing:
    """One picture of the world. `pixels` is uint8 (size, size, 3)."""

    pixels: np.ndarray
    caption: str
    domain: str
    attributes: Attributes


def draw(
    domain: str,
    attributes: Attributes,
    rng: np.random.Generator,
    *,
    size: int = SIZE,
    style: str = "flat",
) -> np.ndarray:
    """Draw one picture of `domain`; what the attributes leave open comes from `rng`."""
    drawer = {"portrait": draw_portrait, "logo": draw_logo, "garment": draw_garment}[domain]
    return restyle(drawer(attributes, rng, size), style)


def sample(
    seed: int | Sequence[int], *, domain: str | None = None, style: str = "flat", size: int = SIZE
) -> Drawing:
    """The picture number `seed` of the world, in the mix of domains the base is trained on."""
    rng = np.random.default_rng(seed)
    drawn = str(rng.choice(list(_SHARE), p=list(_SHARE.values())))
    domain = domain or drawn
    attributes = random_values(DOMAINS[domain], rng)
    pixels = draw(domain, attributes, rng, size=size, style=style)
    mention = float(rng.choice([1.0, 0.75, 0.4, 0.0], p=[0.35, 0.4, 0.15, 0.1]))
    # People of made-up names look like anybody: a name alone says nothing to the base.
    named = domain == "portrait" and rng.random() < 0.3
    text = caption(
        domain, attributes, rng, mention=mention, name=random_name(rng) if named else None
    )
    return Drawing(
        pixels, text if style == "flat" else f"{text}, {style} style", domain, attributes
    )


def random_name(rng: np.random.Generator) -> str:
    """A made-up name of two or three syllables."""
    return "".join(rng.choice(_SYLLABLES, size=int(rng.integers(2, 4))))


def portraits(
    person: Person,
    n: int,
    seed: int | Sequence[int],
    *,
    name: str,
    size: int = SIZE,
    mention: float = 0.0,
) -> list[Drawing]:
    """`n` pictures of one person whose scene, pose, light and expression vary.

    Captions call the person by `name`; `mention` is the share of scene attributes they also tell.
    """
    rng = np.random.default_rng(seed)
    drawings = []
    for _ in range(n):
        scene = random_values(SCENE, rng)
        attributes = {**person.attributes(), **scene}
        text = caption("portrait", scene, rng, mention=mention, name=name)
        drawings.append(
            Drawing(draw("portrait", attributes, rng, size=size), text, "portrait", attributes)
        )
    return drawings


def save_folder(drawings: Sequence[Drawing], folder: Path) -> None:
    """Write pictures as an imagefolder with `metadata.jsonl` (columns `file_name`, `text`)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, drawing in enumerate(drawings):
        name = f"{number:05d}.png"
        Image.fromarray(drawing.pixels).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": drawing.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
