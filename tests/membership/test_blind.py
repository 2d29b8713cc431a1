"""The blind control catches planted shifts and leaves honest splits alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffward.errors import InputError
from diffward.membership.blind import blind_control, blind_features, blind_scores, file_stats
from diffward.membership.statistics import auc

N = 200
LABELS = np.arange(N) % 2


def drawing(index: int) -> np.ndarray:
    """A 64 px picture of random blobs on a slope, so that pictures differ as photographs do."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:64, 0:64] / 64
    picture = rng.uniform(40, 180, 3) + (x * rng.normal(0, 40) + y * rng.normal(0, 40))[..., None]
    for _ in range(6):
        cx, cy, size = [*rng.uniform(0, 1, 2).tolist(), rng.uniform(0.05, 0.3)]
        blob = np.hypot(x - cx, y - cy) < size
        picture[blob] = rng.uniform(0, 255, 3)
    return np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([drawing(i) for i in range(N)])


@pytest.fixture(scope="module")
def captions() -> list[str]:
    things = ("hat", "dress", "shoe", "shirt")
    return [f"a photo of a {things[i * 7 % 4]}, number {i * 31 % 10}" for i in range(N)]


def test_noise_is_centred_on_chance():
    found = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(24) % 2)
        scores = blind_scores(rng.normal(size=(24, 60)), labels, seed)
        found.append(auc(scores[labels == 1], scores[labels == 0]))
    error = np.std(found) / np.sqrt(50)
    assert abs(np.mean(found) - 0.5) < 2.5 * error


def test_honest_splits_pass(pictures, captions):
    features = blind_features(pictures, captions)
    passed = 0
    for seed in range(20):
        labels = np.random.default_rng(seed).permutation(LABELS)
        passed += blind_control(features, labels, seed, permutations=199)[1].ok
    assert passed >= 19


def test_jpeg_quality_shift_is_caught(tmp_path, pictures, captions):
    stats, pixels = [], []
    for i, picture in enumerate(pictures):
        path = tmp_path / f"{i}.jpg"
        Image.fromarray(picture).save(path, quality=60 if LABELS[i] else 95)
        stats.append(file_stats(path))
        pixels.append(np.asarray(Image.open(path)))
    with_files = blind_control(blind_features(np.stack(pixels), captions, stats), LABELS)[1]
    assert not with_files.ok and with_files.auc > 0.95
    pixels_only = blind_control(blind_features(np.stack(pixels), captions), LABELS)[1]
    assert not pixels_only.ok and pixels_only.auc > 0.8


def test_brightness_shift_is_caught(pictures, captions):
    shifted = np.clip(pictures.astype(int) + 30 * LABELS[:, None, None, None], 0, 255)
    check = blind_control(blind_features(shifted.astype(np.uint8), captions), LABELS)[1]
    assert not check.ok and check.auc > 0.6 and "off chance" in check.reason


def test_caption_wording_is_caught(pictures, captions):
    worded = [c.replace("photo", "picture") if k else c for c, k in zip(captions, LABELS)]
    check = blind_control(blind_features(pictures, worded), LABELS)[1]
    assert not check.ok and check.auc > 0.95


def test_copies_on_one_side_are_no_shift(pictures):
    features = blind_features(np.concatenate([pictures[:60], pictures[:60]]))
    labels, copy = np.tile(LABELS[:60], 2), np.tile(np.arange(60), 2)
    assert not blind_control(features, labels)[1].ok
    assert blind_control(features, labels, groups=copy)[1].ok


def test_same_seed_same_scores(pictures):
    features = blind_features(pictures[:40])
    first, again = (blind_scores(features, LABELS[:40], seed=3) for _ in range(2))
    assert np.array_equal(first, again)


def test_constant_features_are_chance():
    scores, check = blind_control(np.ones((10, 3)), np.arange(10) % 2)
    assert check.ok and check.auc == 0.5 and np.allclose(scores, 0.5)


def test_file_stats(tmp_path, pictures):
    jpeg, png = tmp_path / "a.jpg", tmp_path / "b.png"
    Image.fromarray(pictures[0]).save(jpeg, quality=50)
    Image.fromarray(pictures[0]).save(png)
    stats = file_stats(jpeg)
    assert (stats["width"], stats["height"], stats["format"]) == (64, 64, "JPEG")
    assert stats["bytes"] == jpeg.stat().st_size and stats["quant_luma"] > 10
    assert file_stats(png)["quant_luma"] == 0.0
    broken = tmp_path / "c.jpg"
    broken.write_bytes(b"not a picture")
    for path in (broken, tmp_path / "none.jpg"):
        with pytest.raises(InputError, match="cannot be read"):
            file_stats(path)


def test_odd_sizes_and_empty_captions():
    pixels = np.zeros((3, 9, 13, 3), np.uint8)
    features = blind_features(pixels, ["", "a, b", "\ud800 lone surrogate"], [{}, {}, {}])
    assert np.isfinite(features).all()


def test_wrong_input_is_named(pictures):
    with pytest.raises(InputError, match="n, H, W, 3"):
        blind_features(pictures[0])
    with pytest.raises(InputError, match="1 captions for 2 pictures"):
        blind_features(pictures[:2], ["one"])
    with pytest.raises(InputError, match="below 8x8"):
        blind_features(np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="at least 2 members"):
        blind_scores(np.ones((4, 2)), [1, 0, 0, 0])
    with pytest.raises(InputError, match="NaN"):
        blind_scores(np.full((4, 2), np.nan), [1, 0, 1, 0])


def test_blockiness_reads_the_jpeg_grid(pictures):
    buffer = io.BytesIO()
    Image.fromarray(pictures[1]).save(buffer, "JPEG", quality=10)
    raw, blocky = pictures[1], np.asarray(Image.open(buffer))
    features = blind_features(np.stack([raw, blocky]))
    assert (features[1, -2:] > features[0, -2:] + 0.2).all()
