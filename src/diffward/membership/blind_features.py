"""What can be told of a picture and its caption without any model: the input of the blind control."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffward.errors import InputError

Matrix = NDArray[np.float64]

THUMB = 8
BANDS = 8
WORD_BUCKETS = 128
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def file_stats(path: str | Path) -> dict[str, Any]:
    """Facts of a picture file that tell of its making, read from the header only.

    {bytes, width, height, format, mode, quant_luma, quant_chroma, progressive, exif, icc}; the
    quant entries are the means of the JPEG quantisation tables (higher = coarser), 0 elsewhere.
    Raises InputError if it cannot be opened as a picture.
    """
    from PIL import Image

    path = Path(path)
    try:
        with Image.open(path) as image:
            tables = [
                list(table) for table in (getattr(image, "quantization", None) or {}).values()
            ]
            return {
                "bytes": path.stat().st_size,
                "width": image.width,
                "height": image.height,
                "format": image.format or "",
                "mode": image.mode,
                "quant_luma": float(np.mean(tables[0])) if tables else 0.0,
                "quant_chroma": float(np.mean(tables[1])) if len(tables) > 1 else 0.0,
                "progressive": bool(image.info.get("progressive", False)),
                "exif": bool(image.info.get("exif")),
                "icc": bool(image.info.get("icc_profile")),
            }
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error})") from error


def blind_features(
    pixels: NDArray[np.uint8],
    captions: Sequence[str] | None = None,
    stats: Sequence[Mapping[str, Any]] | None = None,
) -> Matrix:
    """Features (n, d) of `pixels` (n, H, W, 3) uint8, their captions and their `file_stats`.

    Raises InputError if the lengths disagree or the pictures are smaller than 8 x 8.
    """
    if pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise InputError(f"pictures must have shape (n, H, W, 3), got {pixels.shape}")
    if min(pixels.shape[1:3]) < THUMB:
        raise InputError(f"pictures of {pixels.shape[2]}x{pixels.shape[1]} are below 8x8 pixels")
    for name, extra in (("captions", captions), ("file stats", stats)):
        if extra is not None and len(extra) != len(pixels):
            raise InputError(f"{len(extra)} {name} for {len(pixels)} pictures")
    parts = [np.stack([_picture(picture) for picture in pixels])]
    if captions is not None:
        parts.append(np.stack([_caption(text) for text in captions]))
    if stats is not None:
        parts.append(np.stack([_file(entry) for entry in stats]))
    return np.concatenate(parts, axis=1)


def _picture(picture: NDArray[np.uint8]) -> Matrix:
    """Colour statistics, thumbnail, frequency bands, sharpness and JPEG blockiness of one picture."""
    rgb = picture.astype(np.float64) / 255
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    saturation = rgb.max(axis=2) - rgb.min(axis=2)
    colour = [
        *rgb.mean(axis=(0, 1)),
        *rgb.std(axis=(0, 1)),
        *np.percentile(luma, [1, 5, 25, 50, 75, 95, 99]),
        saturation.mean(),
        saturation.std(),
        (picture == 0).mean(),
        (picture == 255).mean(),
    ]
    rows = [part.mean(axis=0) for part in np.array_split(rgb, THUMB, axis=0)]
    thumb = [cell.mean(axis=0) for row in rows for cell in np.array_split(row, THUMB, axis=0)]
    return np.concatenate([colour, np.ravel(thumb), _bands(luma), _blockiness(luma)])


def _bands(luma: Matrix) -> Matrix:
    """Log energy of the luma in `BANDS` rings of spatial frequency, and of its Laplacian."""
    height, width = luma.shape
    window = np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.rfft2((luma - luma.mean()) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    ring = np.minimum((radius / 0.5 * BANDS).astype(int), BANDS)
    energy = np.bincount(ring.ravel(), power.ravel(), BANDS + 1)
    cells = np.maximum(np.bincount(ring.ravel(), minlength=BANDS + 1), 1)
    laplace = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2]
    laplace = laplace - luma[1:-1, 2:]
    sharp = [np.log(np.abs(laplace).mean() + 1e-6), (np.abs(laplace) < 1 / 255).mean()]
    return np.concatenate([np.log(energy / cells + 1e-9), sharp])


def _blockiness(luma: Matrix) -> Matrix:
    """Steps across the 8-pixel JPEG grid against steps elsewhere, along both axes."""
    found = []
    for axis in (0, 1):
        steps = np.abs(np.diff(luma, axis=axis)).mean(axis=1 - axis)
        on_grid = np.arange(1, len(steps) + 1) % 8 == 0
        if not on_grid.any():
            found.append(0.0)
            continue
        found.append(np.log((steps[on_grid].mean() + 1e-4) / (steps[~on_grid].mean() + 1e-4)))
    return np.array(found)


def _caption(text: str) -> Matrix:
    """Lengths, punctuation and a hashed bag of words."""
    words = re.findall(r"\w+", text.lower())
    bag = np.zeros(WORD_BUCKETS)
    for word in set(words):
        bag[zlib.crc32(word.encode("utf-8", "surrogatepass")) % WORD_BUCKETS] = 1
    upper = sum(letter.isupper() for letter in text)
    return np.concatenate(
        [[len(text), len(words), text.count(","), text.count("."), upper, not text.strip()], bag]
    )


def _file(stats: Mapping[str, Any]) -> Matrix:
    """`file_stats` as numbers; entries that are missing count as 0."""
    width, height = float(stats.get("width") or 1), float(stats.get("height") or 1)
    size = float(stats.get("bytes") or 0)
    return np.array(
        [
            np.log1p(size),
            size / (width * height),
            np.log(width),
            np.log(height),
            np.log(width / height),
            *[float(stats.get("format") == name) for name in FORMATS],
            float(stats.get("mode") == "RGB"),
            *[float(stats.get(key) or 0) for key in ("quant_luma", "quant_chroma")],
            *[float(bool(stats.get(key))) for key in ("progressive", "exif", "icc")],
        ]
    )
