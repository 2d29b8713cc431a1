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
