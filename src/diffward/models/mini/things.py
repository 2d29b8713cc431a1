"""Draws logos and garments, and the styles that the base has never seen."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from diffward.models.mini.attributes import BACKGROUND, PALETTE, Attributes, word
from diffward.models.mini.pen import Colour, Pen, Point, shade

# "flat" is what the base is trained on; the others are for adapting to.
STYLES = ["flat", "neon", "sketch", "mosaic"]


def draw_logo(attributes: Attributes, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw a logo: a mark on a ground. Returns uint8 (size, size, 3)."""
    ground = BACKGROUND[word("ground", attributes["ground"])]
    colour = PALETTE[word("logo_colour", attributes["logo_colour"])]
    pen = Pen(size, ground)
    pen.pose(rng.uniform(-0.25, 0.25), rng.uniform(0.75, 1.1), tuple(rng.uniform(-0.06, 0.06, 2)))
    # A mark in the colour of its ground would be no mark: it always gets an edge.
    pale = sum(abs(a - b) for a, b in zip(colour, ground, strict=True)) < 120
    edge = rng.random() < 0.5 or pale
    if edge:
        _mark(pen, word("shape", attributes["shape"]), 1.13, shade(colour, 0.55), ground)
    _mark(pen, word("shape", attributes["shape"]), 1.0, colour, ground)
    if rng.random() < 0.5:
        y = rng.uniform(0.86, 0.9)
        pen.rectangle(
            0.5 - rng.uniform(0.12, 0.3),
            y,
            0.5 + rng.uniform(0.12, 0.3),
            y + 0.05,
            shade(colour, 0.7),
        )
    return pen.pixels()


def _mark(pen: Pen, shape: str, grow: float, colour: Colour, ground: Colour) -> None:
    r = 0.3 * grow

    def star(n: int, inner: float) -> list[Point]:
        radii = [r * 1.1 if k % 2 == 0 else r * inner for k in range(2 * n)]
        angles = [math.pi * (k / n - 0.5) for k in range(2 * n)]
        return [
            (0.5 + q * math.cos(a), 0.48 + q * math.sin(a))
            for q, a in zip(radii, angles, strict=True)
        ]

    match shape:
        case "circle":
            pen.ellipse(0.5, 0.48, r, r, colour)
        case "square":
            pen.rectangle(0.5 - r * 0.9, 0.48 - r * 0.9, 0.5 + r * 0.9, 0.48 + r * 0.9, colour)
        case "triangle":
            pen.polygon(
                [
                    (0.5, 0.46 - r * 1.05),
                    (0.5 + r * 1.1, 0.48 + r * 0.85),
                    (0.5 - r * 1.1, 0.48 + r * 0.85),
                ],
                colour,
            )
        case "star":
            pen.polygon(star(5, 0.48), colour)
        case "ring":
            pen.ellipse(0.5, 0.48, r, r, colour)
            pen.ellipse(0.5, 0.48, 0.3 * 0.55, 0.3 * 0.55, ground)
        case "cross":
            pen.rectangle(0.5 - r * 0.36, 0.48 - r, 0.5 + r * 0.36, 0.48 + r, colour)
            pen.rectangle(0.5 - r, 0.48 - r * 0.36, 0.5 + r, 0.48 + r * 0.36, colour)
        case "heart":
            pen.ellipse(0.5 - r * 0.5, 0.4, r * 0.56, r * 0.56, colour)
            pen.ellipse(0.5 + r * 0.5, 0.4, r * 0.56, r * 0.56, colour)
            pen.polygon([(0.5 - r * 1.02, 0.44), (0.5 + r * 1.02, 0.44), (0.5, 0.48 + r)], colour)
        case "drop":
            pen.ellipse(0.5, 0.56, r * 0.74, r * 0.74, colour)
            pen.polygon([(0.5, 0.5 - r * 1.15), (0.5 + r * 0.7, 0.5), (0.5 - r * 0.7, 0.5)], colour)


_OUTLINE: dict[str, list[Point]] = {
    "shirt": [(0.36, 0.2), (0.44, 0.25), (0.56, 0.25), (0.64, 0.2), (0.9, 0.36), (0.8, 0.5), (0.69, 0.43), (0.69, 0.82), (0.31, 0.82), (0.31, 0.43), (0.2, 0.5), (0.1, 0.36)],
    "trousers": [(0.32, 0.12), (0.68, 0.12), (0.74, 0.9), (0.56, 0.9), (0.5, 0.4), (0.44, 0.9), (0.26, 0.9)],
    "dress": [(0.38, 0.1), (0.45, 0.17), (0.55, 0.17), (0.62, 0.1), (0.66, 0.26), (0.59, 0.44), (0.82, 0.9), (0.18, 0.9), (0.41, 0.44), (0.34, 0.26)],
    "skirt": [(0.36, 0.28), (0.64, 0.28), (0.86, 0.76), (0.14, 0.76)],
    "hat": [(0.06, 0.66), (0.28, 0.58), (0.33, 0.3), (0.5, 0.24), (0.67, 0.3), (0.72, 0.58), (0.94, 0.66), (0.72, 0.74), (0.28, 0.74)],
    "coat": [(0.36, 0.1), (0.5, 0.2), (0.64, 0.1), (0.82, 0.2), (0.92, 0.74), (0.78, 0.76), (0.72, 0.42), (0.74, 0.92), (0.26, 0.92), (0.28, 0.42), (0.22, 0.76), (0.08, 0.74), (0.18, 0.2)],
}  # fmt: skip


def draw_garment(attributes: Attributes, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw a piece of clothing laid flat. Returns uint8 (size, size, 3)."""
    value = {name: word(name, index) for name, index in attributes.items()}
    colour, ground = PALETTE[value["garment_colour"]], BACKGROUND[value["backdrop"]]
    pose = (rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.08), tuple(rng.uniform(-0.05, 0.05, 2)))
    pen, stencil = Pen(size, ground), Pen(size, (0, 0, 0))
    pen.pose(*pose)
    stencil.pose(*pose)
    outline = _OUTLINE[value["garment"]]
    stencil.polygon(outline, (255, 255, 255))
    pen.line([*outline, outline[0], outline[1]], 0.045, shade(colour, 0.55))
    cloth = Pen(size, colour)
    cloth.pose(*pose)
    contrast = shade(colour, 0.5) if sum(colour) > 250 else (190, 190, 196)
    if value["pattern"] == "striped":
        for k in range(-3, 14):
            cloth.rectangle(-0.3, k * 0.1, 1.3, k * 0.1 + 0.042, contrast)
    elif value["pattern"] == "dotted":
        for i in range(-2, 12):
            for j in range(-2, 12):
                cloth.ellipse(i * 0.12 + 0.06 * (j % 2), j * 0.11, 0.034, 0.034, contrast)
    pen.image.paste(cloth.image, (0, 0), stencil.image.convert("L"))
    if value["garment"] == "coat":
        pen.line(
            [(0.5, 0.2), (0.5, 0.92)],
            0.024,
            shade(colour, 0.4) if sum(colour) > 250 else (150, 150, 156),
        )
    if value["garment"] == "hat":
        pen.line(
            [(0.285, 0.56), (0.5, 0.6), (0.715, 0.56)],
            0.05,
            shade(colour, 0.4) if sum(colour) > 250 else (150, 150, 156),
        )
    return pen.pixels()


def restyle(pixels: np.ndarray, style: str) -> np.ndarray:
    """Redraw a picture in another of `STYLES`. uint8 (H, W, 3) in and out."""
    image = Image.fromarray(pixels)
    match style:
        case "flat":
            return pixels
        case "neon":
            edges = _edges(image)
            vivid = np.asarray(
                ImageOps.autocontrast(image.filter(ImageFilter.MaxFilter(3)))
            ).astype(float)
            vivid = vivid / np.maximum(vivid.max(axis=2, keepdims=True), 1)
            glow = (
                np.asarray(
                    Image.fromarray((edges * 255).astype(np.uint8)).filter(
                        ImageFilter.GaussianBlur(2)
                    )
                )
                / 255
            )
            light = np.clip(edges + 0.9 * glow, 0, 1)[..., None]
            return np.clip(np.array([14, 8, 34]) + light * (60 + vivid * 195), 0, 255).astype(
                np.uint8
            )
        case "sketch":
            grey = np.asarray(image.convert("L")) / 255
            y, x = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]]
            hatch = ((x + y) % 4 < 1) * (grey < 0.55) * 0.45
            ink = np.clip(_edges(image) * 1.2 + hatch, 0, 1)[..., None]
            return (np.array([250, 246, 232]) * (1 - ink) + np.array([40, 40, 60]) * ink).astype(
                np.uint8
            )
        case "mosaic":
            small = image.resize((16, 16), Image.Resampling.BOX)
            big = np.array(small.resize(image.size, Image.Resampling.NEAREST))
            step = image.size[0] // 16
            big[::step] = big[:, ::step] = (70, 66, 60)
            return big
        case _:
            raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")


def _edges(image: Image.Image) -> np.ndarray:
    """Strength of the edges, 0 to 1, (H, W)."""
    channels = np.asarray(image).astype(float) / 255
    dx = np.abs(np.diff(channels, axis=1, append=channels[:, -1:])).max(axis=2)
    dy = np.abs(np.diff(channels, axis=0, append=channels[-1:])).max(axis=2)
    return np.clip(np.hypot(dx, dy) * 2.2, 0, 1)
