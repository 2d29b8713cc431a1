"""Draws a portrait of a fictional person."""

from __future__ import annotations

import numpy as np

from diffward.models.mini.attributes import BACKGROUND, EYES, HAIR, PALETTE, SKIN, Attributes, word
from diffward.models.mini.pen import Colour, Pen, shade

_FACE = {"round": (0.255, 0.265), "long": (0.205, 0.31), "square": (0.235, 0.27)}
_LINE: Colour = (26, 22, 26)


def draw_portrait(attributes: Attributes, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw a person in a scene.

    Args:
        attributes: value indices of `IDENTITY` and `SCENE`.
        rng: draws what no caption names: pose, light, the pattern behind and the cut of the shirt.
        size: side in pixels.

    Returns:
        uint8 (size, size, 3).
    """
    value = {name: word(name, index) for name, index in attributes.items()}
    ground = BACKGROUND[value["background"]]
    pen = Pen(size, ground)
    _backdrop(pen, ground, rng)
    turn, scale = rng.uniform(-0.16, 0.16), rng.uniform(1.02, 1.18)
    shift = (rng.uniform(-0.05, 0.05), rng.uniform(-0.005, 0.06))
    pen.pose(turn, scale, shift, (0.5, 0.6))
    skin, hair = SKIN[value["skin"]], HAIR[value["hair_colour"]]
    rx, ry = _FACE[value["face"]]
    _hair_behind(pen, value["hair_style"], hair, rx)
    _body(pen, PALETTE[value["clothing"]], skin, rng)
    for side in (-1, 1):
        pen.ellipse(0.5 + side * rx, 0.5, 0.04, 0.065, shade(skin, 0.86))
    _face(pen, value["face"], rx, ry, skin)
    _cheeks(pen, value["cheeks"], skin)
    _beard(pen, value["beard"], value["face"], rx, ry, shade(hair, 0.8))
    _mouth(pen, value["expression"])
    _eyes(pen, EYES[value["eyes"]], rng.uniform(-0.012, 0.012))
    pen.line([(0.5, 0.5), (0.485, 0.56), (0.515, 0.565)], 0.014, shade(skin, 0.66))
    _hair_front(pen, value["hair_style"], hair, rx, ry)
    for side in (-1, 1):
        pen.line([(0.5 + side * 0.06, 0.405), (0.5 + side * 0.165, 0.4)], 0.022, shade(hair, 0.6))
    _glasses(pen, value["glasses"])
    return _light(pen.pixels(), rng)


def _backdrop(pen: Pen, ground: Colour, rng: np.random.Generator) -> None:
    darker = shade(ground, 0.88)
    match int(rng.integers(4)):
        case 1:
            x = rng.uniform(0, 0.2)
            for k in range(-1, 5):
                pen.rectangle(x + k * 0.25, 0, x + k * 0.25 + 0.1, 1, darker)
        case 2:
            x, y = rng.uniform(0, 0.25, 2)
            for i in range(4):
                for j in range(4):
                    pen.ellipse(x + i * 0.28, y + j * 0.28, 0.06, 0.06, darker)
        case 3:
            pen.rectangle(0, rng.uniform(0.45, 0.7), 1, 1, darker)


def _body(pen: Pen, cloth: Colour, skin: Colour, rng: np.random.Generator) -> None:
    pen.rectangle(0.42, 0.68, 0.58, 0.9, shade(skin, 0.82))
    shoulders = [
        (0.08, 1.25),
        (0.14, 0.93),
        (0.3, 0.85),
        (0.42, 0.83),
        (0.58, 0.83),
        (0.7, 0.85),
        (0.86, 0.93),
        (0.92, 1.25),
    ]
    pen.polygon(shoulders, cloth)
    match int(rng.integers(3)):
        case 0:
            pen.polygon([(0.42, 0.82), (0.58, 0.82), (0.5, 0.93)], shade(skin, 0.9))
        case 1:
            pen.line([(0.4, 0.84), (0.5, 0.9), (0.6, 0.84)], 0.03, shade(cloth, 0.6))
        case 2:
            pen.rectangle(0.485, 0.84, 0.515, 1.2, shade(cloth, 0.6))


def _face(pen: Pen, shape: str, rx: float, ry: float, skin: Colour) -> None:
    if shape == "square":
        y, c = 0.5, 0.07
        pen.polygon(
            [(0.5 - rx, y - ry + c), (0.5 - rx + c, y - ry), (0.5 + rx - c, y - ry), (0.5 + rx, y - ry + c),
             (0.5 + rx, y + ry - c), (0.5 + rx - c, y + ry), (0.5 - rx + c, y + ry), (0.5 - rx, y + ry - c)],
            skin,
        )  # fmt: skip
    else:
        pen.ellipse(0.5, 0.5, rx, ry, skin)


def _eyes(pen: Pen, iris: Colour, gaze: float) -> None:
    for side in (-1, 1):
        x = 0.5 + side * 0.11
        pen.ellipse(x, 0.475, 0.064, 0.05, (252, 252, 252))
        pen.ellipse(x + gaze, 0.475, 0.042, 0.046, iris)
        pen.ellipse(x + gaze, 0.475, 0.014, 0.016, _LINE)


def _mouth(pen: Pen, expression: str) -> None:
    lips: Colour = (164, 44, 54)
    if expression == "smiling":
        pen.line([(0.42, 0.63), (0.46, 0.66), (0.54, 0.66), (0.58, 0.63)], 0.024, lips)
    elif expression == "serious":
        pen.line([(0.43, 0.65), (0.57, 0.65)], 0.024, lips)
    else:
        pen.polygon([(0.41, 0.62), (0.59, 0.62), (0.55, 0.69), (0.45, 0.69)], lips)
        pen.polygon([(0.43, 0.622), (0.57, 0.622), (0.56, 0.645), (0.44, 0.645)], (252, 250, 246))


def _cheeks(pen: Pen, cheeks: str, skin: Colour) -> None:
    for side in (-1, 1):
        x = 0.5 + side * 0.145
        if cheeks == "rosy":
            pen.ellipse(x, 0.575, 0.05, 0.034, (238, 104, 116))
        elif cheeks == "freckled":
            dark = shade(skin, 0.5) if sum(skin) > 300 else (216, 170, 120)
            for dx, dy in ((-0.036, 0.0), (0.0, 0.026), (0.036, 0.0)):
                pen.ellipse(x + dx, 0.563 + dy, 0.0125, 0.0125, dark)


def _beard(pen: Pen, beard: str, face: str, rx: float, ry: float, hair: Colour) -> None:
    bottom = 0.5 + ry
    if beard == "full":
        side = rx * (1.0 if face == "square" else 0.93)
        pen.polygon(
            [(0.5 - side, 0.58), (0.5 - side * 0.72, 0.6), (0.4, 0.605), (0.6, 0.605), (0.5 + side * 0.72, 0.6), (0.5 + side, 0.58),
             (0.5 + side * 0.88, bottom - 0.08), (0.5 + side * 0.5, bottom + 0.02), (0.5, bottom + 0.04),
             (0.5 - side * 0.5, bottom + 0.02), (0.5 - side * 0.88, bottom - 0.08)],
            hair,
        )  # fmt: skip
        pen.ellipse(
            0.5, 0.65, 0.085, 0.038, shade(hair, 1.0) if sum(hair) > 330 else shade(hair, 1.5)
        )
    elif beard == "moustache":
        pen.polygon(
            [(0.5, 0.585), (0.6, 0.605), (0.63, 0.64), (0.5, 0.622), (0.37, 0.64), (0.4, 0.605)],
            hair,
        )
    elif beard == "goatee":
        pen.polygon(
            [(0.43, 0.69), (0.57, 0.69), (0.56, bottom), (0.5, bottom + 0.05), (0.44, bottom)], hair
        )


def _hair_behind(pen: Pen, style: str, hair: Colour, rx: float) -> None:
    if style == "long":
        pen.polygon(
            [
                (0.5 - rx - 0.07, 0.42),
                (0.5 + rx + 0.07, 0.42),
                (0.5 + rx + 0.1, 0.98),
                (0.5 - rx - 0.1, 0.98),
            ],
            shade(hair, 0.86),
        )
        pen.ellipse(0.5, 0.4, rx + 0.07, 0.24, hair)
    elif style == "bob":
        pen.polygon(
            [
                (0.5 - rx - 0.06, 0.4),
                (0.5 + rx + 0.06, 0.4),
                (0.5 + rx + 0.1, 0.7),
                (0.5 - rx - 0.1, 0.7),
            ],
            shade(hair, 0.86),
        )
        pen.ellipse(0.5, 0.4, rx + 0.06, 0.24, hair)
    elif style == "curly":
        for a in np.linspace(0.05, np.pi - 0.05, 9):
            pen.ellipse(0.5 + np.cos(a) * (rx + 0.04), 0.44 - np.sin(a) * 0.26, 0.095, 0.095, hair)
    elif style == "bun":
        pen.ellipse(0.5, 0.145, 0.105, 0.095, hair)


def _hair_front(pen: Pen, style: str, hair: Colour, rx: float, ry: float) -> None:
    top = 0.5 - ry
    if style == "mohawk":
        pen.polygon(
            [
                (0.435, top + 0.1),
                (0.43, top - 0.05),
                (0.46, top - 0.14),
                (0.54, top - 0.14),
                (0.57, top - 0.05),
                (0.565, top + 0.1),
            ],
            hair,
        )
        return
    cap = [(0.5 - rx - 0.015, 0.45)]
    cap += [
        (0.5 + np.cos(a) * (rx + 0.02), top + 0.21 - np.sin(a) * 0.24)
        for a in np.linspace(np.pi, 0, 14)
    ]
    cap += [(0.5 + rx + 0.015, 0.45), (0.5 + rx * 0.8, 0.375)]
    fringe = {
        "short": [(0.62, 0.36), (0.5, 0.335), (0.38, 0.36)],
        "long": [(0.56, 0.33), (0.5, 0.28), (0.44, 0.33)],
        "curly": [(0.6, 0.34), (0.5, 0.36), (0.4, 0.34)],
        "bun": [(0.6, 0.3), (0.5, 0.27), (0.4, 0.3)],
        "bob": [(0.62, 0.385), (0.5, 0.385), (0.38, 0.385)],
    }[style]
    pen.polygon([*cap, *fringe, (0.5 - rx * 0.8, 0.375)], hair)


def _glasses(pen: Pen, glasses: str) -> None:
    if glasses == "none":
        return
    for side in (-1, 1):
        x = 0.5 + side * 0.11
        if glasses == "round":
            pen.ring(x, 0.475, 0.088, 0.088, 0.024, _LINE)
        else:
            box = [
                (x - 0.09, 0.405),
                (x + 0.09, 0.405),
                (x + 0.09, 0.545),
                (x - 0.09, 0.545),
                (x - 0.09, 0.405),
                (x, 0.405),
            ]
            pen.line(box, 0.026, _LINE)
    pen.line([(0.475, 0.47), (0.525, 0.47)], 0.024, _LINE)


def _light(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light falls from one side: a linear ramp and an overall brightness."""
    size = pixels.shape[0]
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.14)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    ramp = rng.uniform(0.9, 1.05) * (1 + depth * (np.cos(angle) * x + np.sin(angle) * y) * 2)
    return np.clip(pixels * ramp[..., None], 0, 255).astype(np.uint8)
