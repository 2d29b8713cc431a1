"""Every odd kind of picture comes out as the upright RGB picture it shows."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from diffward.data import load_pictures
from diffward.errors import InputError

from .conftest import photo

SIZE = 32


def load(path: Path) -> np.ndarray:
    (picture,) = load_pictures(path.parent)
    pixels = picture.load(SIZE)
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    return pixels


def close(a: np.ndarray, b: np.ndarray | tuple[int, int, int], tolerance: int) -> bool:
    return int(np.abs(a.astype(int) - np.asarray(b).astype(int)).max()) <= tolerance


@pytest.fixture
def truth() -> np.ndarray:
    return np.asarray(photo(3, (64, 64)).resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def test_rgb(tmp_path, truth):
    photo(3, (64, 64)).save(tmp_path / "a.png")
    assert (load(tmp_path / "a.png") == truth).all()


def test_grayscale(tmp_path):
    gray = photo(3, (64, 64)).convert("L")
    gray.save(tmp_path / "a.png")
    expected = np.asarray(gray.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    assert (load(tmp_path / "a.png") == expected[..., None]).all()


def test_palette(tmp_path):
    image = photo(3, (64, 64)).quantize(256)
    image.save(tmp_path / "a.png")
    expected = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    assert (load(tmp_path / "a.png") == np.asarray(expected)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "key"])
def test_transparency_is_white(tmp_path, mode):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # black where nobody sees it
    image.paste((0, 0, 0, 255), (0, 0, 40, 20))
    path = tmp_path / "a.png"
    if mode == "RGBA":
        image.save(path)
    elif mode == "LA":
        image.convert("LA").save(path)
    elif mode == "palette":
        indexed = Image.new("P", (40, 40), 1)
        indexed.putpalette([0, 0, 0, 9, 9, 9])
        indexed.paste(0, (0, 0, 40, 20))
        indexed.save(path, transparency=1)
    else:
        keyed = Image.new("RGB", (40, 40), (0, 0, 9))
        keyed.paste((0, 0, 0), (0, 0, 40, 20))
        keyed.save(path, transparency=(0, 0, 9))
    pixels = load(path)
    assert close(pixels[2:12], (0, 0, 0), 1) and close(pixels[20:30], (255, 255, 255), 1)


def test_half_transparent(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert close(load(tmp_path / "a.webp"), (127, 127, 127), 1)


def test_cmyk(tmp_path):
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert close(load(tmp_path / "a.jpg"), (255, 0, 0), 3)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    row = load(tmp_path / f"a.{suffix}")[16, :, 0].astype(int)
    assert close(row, np.linspace(0, 255, SIZE), 5) and (np.diff(row) > 0).all()


def test_float_tiff(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    assert close(load(tmp_path / "a.tif"), (128, 128, 128), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Stored as a camera would with each orientation, the picture comes out as it was seen."""
    upright = photo(5, (64, 96))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    expected = upright.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=(0, 16, 64, 80))
    assert close(load(tmp_path / "a.png"), np.asarray(expected), 1)


def test_damaged_exif_costs_nothing(tmp_path, truth):
    photo(3, (64, 64)).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert (load(tmp_path / "a.png") == truth).all()


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 20), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(
        tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options
    )
    assert close(load(tmp_path / f"a.{suffix}"), (255, 0, 0), 1)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot read AVIF")
def test_avif(tmp_path, truth):
    photo(3, (64, 64)).save(tmp_path / "a.avif", quality=95)
    assert np.abs(load(tmp_path / "a.avif").astype(int) - truth).mean() < 5


def test_content_decides_not_the_suffix(tmp_path, truth):
    photo(3, (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert (load(tmp_path / "a.jpg") == truth).all()


def test_crop_is_the_centre_and_strips_are_cheap(tmp_path):
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    wide.save(tmp_path / "a.png")
    assert close(load(tmp_path / "a.png"), (0, 0, 255), 6)
    strip = tmp_path / "strip"
    strip.mkdir()
    Image.new("RGB", (1, 60_000), "lime").save(strip / "a.png")
    assert close(load(strip / "a.png"), (0, 255, 0), 0)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize("side", [11_000, 60_000, 2**31 - 1])
def test_claimed_size_is_not_believed(tmp_path, side):
    photo(1).save(tmp_path / "good.png")
    (tmp_path / "bomb.png").write_bytes(png_claiming(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = load_pictures(tmp_path)
    ((name, reason),) = pictures.skipped
    assert name == "bomb.png" and len(pictures) == 1
    assert "megapixels" in reason or "bomb" in reason or "damaged" in reason


def test_large_jpeg_is_decoded_small(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (11_000, 10_000), 200).save(buffer, "JPEG", quality=10)
    (tmp_path / "big.jpg").write_bytes(buffer.getvalue())
    assert close(load(tmp_path / "big.jpg"), (200, 200, 200), 3)


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "a.png"
    photo(1).save(path)
    (picture,) = load_pictures(tmp_path)
    photo(2).save(path)
    with pytest.raises(InputError, match="changed since"):
        picture.load(8)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read any more"):
        picture.load(8)
    with pytest.raises(InputError, match="not positive"):
        picture.load(0)
