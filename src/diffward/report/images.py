"""Pictures inside a page."""

from __future__ import annotations

import base64
import io

import numpy as np


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def small(pixels: np.ndarray, side: int = 96) -> np.ndarray:
    """At most `side` pixels wide and high."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)
