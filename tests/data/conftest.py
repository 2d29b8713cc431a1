"""Pictures made on the spot, and the shared real ones where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw


def photo(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A picture like no other seed's: colourful shapes on a gradient."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    image = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        w, h = rng.uniform(0.1, 0.5, 2) * size
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        [draw.ellipse, draw.rectangle][rng.integers(2)]((x, y, x + w, y + h), fill=colour)
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder("a.png", "b/c.jpg")` saves distinct pictures under these names."""

    def make(*names: str, root: str = "pictures", first: int = 0) -> Path:
        top = tmp_path / root
        top.mkdir(exist_ok=True)
        for seed, name in enumerate(names, start=first):
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(seed).save(path)
        return top

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    path = Path(__file__).parents[3] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared test pictures (../shared/data) are not here")
    return path
