"""From the bytes of a picture file to upright RGB pixels."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

#: Suffixes that are looked at; the content decides, not the suffix.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
#: Decoders that may run. Others (EPS, PDF, …) start outside programs or parse what nobody asked for.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
#: Above this many pixels only what can be decoded at reduced size (JPEG) is read.
MAX_PIXELS = 100_000_000


class UnreadableError(Exception):
    """This file cannot be read as a picture; the message is the reason, fit for a list."""


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings: size is judged here, damaged EXIF is harmless.

    Enter it once around a batch, from one thread: warning filters are process-wide.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\..*")
        yield


def decode(data: bytes, at_least: int) -> Image.Image:
    """Decode the first frame of a picture to upright RGB.

    EXIF (or TIFF) rotation is applied; transparency is composited on white; grayscale, palette,
    CMYK and 16-bit pictures become 8-bit RGB. A JPEG may come back reduced, its shorter side no
    less than `at_least` (unless it was smaller): decoding a photo costs a fraction then.

    Raises:
        UnreadableError: with the reason.
    """
    if not data:
        raise UnreadableError("empty file (zero bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableError(
                f"{width} x {height} pixels, more than the {MAX_PIXELS // 10**6} megapixels read"
            )
        if width < 1 or height < 1:
            raise UnreadableError("has no pixels")
        image.load()
        return _to_rgb(_upright(image))
    except UnreadableError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableError("claims a size beyond all bounds (decompression bomb)") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableError("not a picture in a format that is read here") from error
    except MemoryError as error:
        raise UnreadableError("needs more memory than there is") from error
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableError(f"damaged or truncated: {reason}") from error


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` with antialiasing and crop the centre.

    Returns uint8 (size, size, 3). Only the square is ever made, so that a strip of 1 x 100,000
    pixels costs no more than any picture.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block must not cost the picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_to_8bit(image), "L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_8bit(image: Image.Image) -> np.ndarray:
    """Grayscale of more than 8 bits to uint8: by its type where that says the range, else by its
    values (0..1, 0..255, 0..65535, or up to its largest)."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    largest = float(values.max(initial=0.0))
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif image.mode == "F" and largest <= 1.0:
        full = 1.0
    else:
        full = next((bound for bound in (255.0, 65535.0) if largest <= bound), largest)
    return np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8)
