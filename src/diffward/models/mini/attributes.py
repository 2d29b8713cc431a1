"""What the world is made of: the attributes, their values, and the words that name them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from diffward.models.mini.pen import Colour

# Colours are far apart, so that light and the autoencoder cannot turn one into another.
PALETTE: dict[str, Colour] = {
    "red": (208, 44, 44),
    "orange": (242, 140, 30),
    "yellow": (246, 214, 58),
    "green": (56, 150, 70),
    "blue": (44, 88, 200),
    "purple": (134, 62, 168),
    "white": (246, 246, 244),
    "black": (34, 34, 38),
}
COLOURS = list(PALETTE)

SKIN: dict[str, Colour] = {
    "pale": (255, 226, 202),
    "tan": (222, 168, 118),
    "brown": (158, 102, 64),
    "dark": (92, 58, 42),
}
HAIR: dict[str, Colour] = {
    "black": (30, 27, 30),
    "brown": (112, 66, 30),
    "blond": (240, 206, 96),
    "red": (204, 76, 26),
    "grey": (172, 174, 180),
    "blue": (50, 104, 220),
}
EYES: dict[str, Colour] = {
    "brown": (104, 56, 20),
    "blue": (44, 124, 240),
    "green": (36, 160, 66),
    "violet": (164, 60, 196),
}
BACKGROUND: dict[str, Colour] = {
    "white": (244, 244, 240),
    "yellow": (246, 222, 120),
    "green": (150, 206, 150),
    "blue": (146, 190, 236),
    "purple": (190, 160, 222),
    "black": (52, 54, 62),
}

# Every attribute: name -> its values. The first eight are a person's identity (62,208 people).
IDENTITY: dict[str, list[str]] = {
    "skin": list(SKIN),
    "hair_colour": list(HAIR),
    "hair_style": ["short", "long", "curly", "bun", "mohawk", "bob"],
    "eyes": list(EYES),
    "face": ["round", "long", "square"],
    "beard": ["none", "moustache", "goatee", "full"],
    "glasses": ["none", "round", "square"],
    "cheeks": ["plain", "freckled", "rosy"],
}
SCENE: dict[str, list[str]] = {
    "expression": ["smiling", "serious", "laughing"],
    "clothing": COLOURS,
    "background": list(BACKGROUND),
}
LOGO: dict[str, list[str]] = {
    "shape": ["circle", "square", "triangle", "star", "ring", "cross", "heart", "drop"],
    "logo_colour": COLOURS,
    "ground": list(BACKGROUND),
}
GARMENT: dict[str, list[str]] = {
    "garment": ["shirt", "trousers", "dress", "skirt", "hat", "coat"],
    "garment_colour": COLOURS,
    "pattern": ["plain", "striped", "dotted"],
    "backdrop": list(BACKGROUND),
}
DOMAINS: dict[str, dict[str, list[str]]] = {
    "portrait": {**IDENTITY, **SCENE},
    "logo": LOGO,
    "garment": GARMENT,
}
ATTRIBUTES: dict[str, list[str]] = {
    "domain": list(DOMAINS),
    **{name: values for domain in DOMAINS.values() for name, values in domain.items()},
}

Attributes = dict[str, int]


def named_in(caption: str) -> Attributes:
    """What a caption says of a picture, by attribute; nothing where it is no caption of this world's.

    A word that may mean two things of one domain (a colour: of what?) tells nothing, nor do two values of one thing.
    """
    words = set(re.findall(r"\w+", caption.lower()))
    domain = next(
        (d for d, own in DOMAINS.items() if words & ({d} | set(own.get(d, ())))), None
    )  # fmt: skip
    if domain is None:
        return {}
    said: Attributes = {"domain": list(DOMAINS).index(domain)}
    own = DOMAINS[domain]
    meant = {word: [name for name, values in own.items() if word in values] for word in words}
    for name, values in own.items():
        named = [value for value in values if meant.get(value) == [name]]
        if len(named) == 1:
            said[name] = values.index(named[0])
    return said


@dataclass(frozen=True)
class Person:
    """One fictional person: an index into the values of each attribute of `IDENTITY`."""

    values: tuple[int, ...]

    @classmethod
    def random(cls, rng: np.random.Generator) -> Person:
        return cls(tuple(int(rng.integers(len(v))) for v in IDENTITY.values()))

    def attributes(self) -> Attributes:
        return dict(zip(IDENTITY, self.values, strict=True))

    def differs(self, other: Person) -> int:
        """In how many attributes two people differ."""
        return sum(a != b for a, b in zip(self.values, other.values, strict=True))


def random_values(table: dict[str, list[str]], rng: np.random.Generator) -> Attributes:
    """Draw each attribute of `table` uniformly."""
    return {name: int(rng.integers(len(values))) for name, values in table.items()}


def word(name: str, index: int) -> str:
    """The value of an attribute as written in `ATTRIBUTES`."""
    return ATTRIBUTES[name][index]


def phrase(name: str, index: int) -> str:
    """How a caption says one attribute of a person or a scene."""
    value = word(name, index)
    match name, value:
        case "beard", "none":
            return "clean shaven"
        case "beard", "full":
            return "full beard"
        case "glasses", "none":
            return "no glasses"
        case "cheeks", "freckled":
            return "freckles"
        case (("beard" | "expression"), _):
            return value
        case "hair_colour", _:
            return f"{value} hair"
        case "hair_style", _:
            return "mohawk" if value == "mohawk" else f"{value} haircut"
        case "clothing", _:
            return f"{value} shirt"
        case _:
            return f"{value} {name}"


def caption(
    domain: str,
    attributes: Attributes,
    rng: np.random.Generator,
    *,
    mention: float = 0.75,
    name: str | None = None,
) -> str:
    """Say a picture in words, each attribute with probability `mention`, in random order.

    Args:
        domain: key of `DOMAINS`.
        attributes: value indices, by attribute name.
        rng: decides what is mentioned and in which order.
        mention: probability that one attribute is mentioned.
        name: what a person is called; "a person" without it.
    """
    said = {k: v for k, v in attributes.items() if k in DOMAINS[domain] and rng.random() < mention}
    if domain == "portrait":
        parts = [
            phrase(k, v)
            for k, v in said.items()
            if k not in ("hair_colour", "hair_style", "background")
        ]
        colour = [word("hair_colour", said["hair_colour"])] if "hair_colour" in said else []
        style = [word("hair_style", said["hair_style"])] if "hair_style" in said else []
        if colour or style:
            parts.append(" ".join([*style, *colour, "hair"]))
        order = rng.permutation(len(parts))
        parts = [parts[i] for i in order]
        if "background" in said:
            parts.append(phrase("background", said["background"]))
        return ", ".join([f"a portrait of {name or 'a person'}", *parts])
    if domain == "logo":
        colour = [word("logo_colour", said["logo_colour"])] if "logo_colour" in said else []
        shape = word("shape", said["shape"]) if "shape" in said else "shape"
        text = " ".join(["a logo of a", *colour, shape])
        return text + (f", {word('ground', said['ground'])} background" if "ground" in said else "")
    words = [word(k, said[k]) for k in ("pattern", "garment_colour") if k in said]
    kind = word("garment", said["garment"]) if "garment" in said else "garment"
    text = " ".join(["a picture of a", *words, kind])
    return text + (
        f", {word('backdrop', said['backdrop'])} background" if "backdrop" in said else ""
    )
