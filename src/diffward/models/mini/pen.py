"""A pen that draws shapes in unit coordinates under a pose (turn, scale, shift)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

_CIRCLE = np.stack(
    [np.cos(np.linspace(0, 2 * math.pi, 28, endpoint=False)),
     np.sin(np.linspace(0, 2 * math.pi, 28, endpoint=False))], axis=1
)  # fmt: skip

SUPERSAMPLE = 3  # edges are anti-aliased by drawing larger and averaging


def shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) or lighten (factor > 1) a colour."""
    r, g, b = (min(255, max(0, round(c * factor))) for c in colour)
    return r, g, b


class Pen:
    """Draws on a square canvas of `size` pixels; x and y run from 0 to 1."""

    def __init__(self, size: int, ground: Colour) -> None:
        self.size = size
        self.canvas = size * SUPERSAMPLE
        self.image = Image.new("RGB", (self.canvas, self.canvas), ground)
        self._draw = ImageDraw.Draw(self.image)
        self.pose()

    def pose(
        self,
        turn: float = 0.0,
        scale: float = 1.0,
        shift: Point = (0.0, 0.0),
        centre: Point = (0.5, 0.5),
    ) -> None:
        """Everything drawn from now on is turned (radians) and scaled about `centre`, then shifted."""
        cos, sin = math.cos(turn) * scale, math.sin(turn) * scale
        self._matrix = np.array([[cos, sin], [-sin, cos]])
        self._centre = np.array(centre)
        self._shift = np.array(centre) + np.array(shift)
        self._scale = scale

    def _place(self, points: np.ndarray) -> list[tuple[float, float]]:
        placed = ((points - self._centre) @ self._matrix + self._shift) * self.canvas
        return [(float(x), float(y)) for x, y in placed]

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self._draw.polygon(self._place(np.asarray(points, dtype=float)), fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        self._draw.polygon(self._place(_CIRCLE * (rx, ry) + (x, y)), fill=fill)

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, fill: Colour) -> None:
        points = self._place(_CIRCLE * (rx, ry) + (x, y))
        self._draw.line(
            [*points, points[0], points[1]], fill=fill, width=self._width(width), joint="curve"
        )

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        self._draw.line(
            self._place(np.asarray(points, dtype=float)),
            fill=fill,
            width=self._width(width),
            joint="curve",
        )

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def _width(self, width: float) -> int:
        return max(1, round(width * self._scale * self.canvas))

    def pixels(self) -> np.ndarray:
        """The picture as uint8 (size, size, 3)."""
        return np.asarray(self.image.resize((self.size, self.size), Image.Resampling.BOX))
