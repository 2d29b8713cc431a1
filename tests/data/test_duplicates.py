"""Copies are found whatever was done to them; distinct pictures are left alone."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from diffward.data import Picture, load_pictures, near_duplicate_groups, near_duplicate_pairs
from diffward.data.pictures import THUMBNAIL

from .conftest import photo


def pictures(*images: Image.Image) -> list[Picture]:
    size = (THUMBNAIL, THUMBNAIL)
    return [
        Picture(
            Path(f"{i}.png"),
            "",
            f"{i:064x}",
            thumbnail=np.asarray(image.resize(size, Image.Resampling.BOX)),
        )
        for i, image in enumerate(images)
    ]


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


CHANGES = {
    "re-encoded": lambda image: as_jpeg(image, 40),
    "smaller": lambda image: image.resize((60, 60), Image.Resampling.BICUBIC),
    "larger and stretched": lambda image: image.resize((150, 140), Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
    "cropped": lambda image: image.crop((3, 2, 94, 93)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "flatter": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
    "mirrored, cropped, re-encoded": lambda image: as_jpeg(
        ImageOps.mirror(image).crop((2, 2, 95, 94)), 60
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found(change):
    originals = [photo(seed) for seed in range(30)]
    copies = [CHANGES[change](image) for image in originals]
    groups = near_duplicate_groups(pictures(*originals, *copies))
    found = sum([i, i + 30] in groups for i in range(30))
    assert found >= 29, f"{found} of 30"
    assert all(len({i % 30 for i in group}) == 1 for group in groups), "joined distinct pictures"


def test_distinct_pictures_stay_apart():
    assert near_duplicate_pairs(pictures(*[photo(seed) for seed in range(300)])) == []


def test_signs_on_one_template_are_not_copies():
    """The same tile with another sign in it: alike to any whole-picture hash."""
    tiles = []
    for cells in ("0123", "4567", "0347", "1256"):
        tile = Image.new("RGB", (96, 96), "white")
        tile.paste((30, 80, 200), (4, 4, 92, 92))
        for cell in map(int, cells):
            x, y = 24 + cell % 2 * 24, 10 + cell // 2 * 19
            tile.paste((255, 255, 255), (x, y, x + 22, y + 17))
        tiles.append(tile)
    assert len(near_duplicate_groups(pictures(*tiles), poses=False)) == 4


def test_flat_pictures_are_told_by_colour():
    colours = ["white", "white", (253, 254, 255), "black", (200, 30, 30), (30, 200, 30)]
    groups = near_duplicate_groups(pictures(*[Image.new("RGB", (9, 9), c) for c in colours]))
    assert groups == [[0, 1, 2], [3], [4], [5]]


def test_groups_are_what_pairs_connect_and_cover_everything(folder):
    root = folder("a.png", "b.png", "c.png")
    (root / "copy.png").write_bytes((root / "b.png").read_bytes())
    ImageOps.mirror(photo(2)).save(root / "mirror.png")
    groups = near_duplicate_groups(load_pictures(root))
    assert groups == [[0], [1, 3], [2, 4]]
    assert near_duplicate_groups([]) == []


def test_pictures_without_thumbnail_are_read(folder):
    root = folder("a.png", "b.png")
    bare = [Picture(p.path, "", p.sha256) for p in load_pictures(root)] * 2
    assert near_duplicate_groups(bare) == [[0, 2], [1, 3]]


def test_real_traps(shared):
    subjects = load_pictures(shared / "subjects")
    names = [picture.name for picture in subjects]
    groups = [[names[i] for i in group] for group in near_duplicate_groups(subjects)]
    assert ["dog5/02.jpg", "dog5/03.jpg"] in groups
    assert [f"red_cartoon/0{i}.jpg" for i in range(4)] in groups
    assert sum(len(group) > 1 for group in groups) <= 4


@pytest.mark.slow
def test_real_photos_are_not_lumped_together(shared):
    clothing = load_pictures(shared / "clothing")
    joined = [g for g in near_duplicate_groups(clothing) if len(g) > 1]
    assert sum(map(len, joined)) <= 0.03 * len(clothing) and max(map(len, joined)) <= 6


@pytest.mark.slow
def test_real_logos_are_not_copies_of_one_another(shared):
    logos = load_pictures(shared / "logos")
    assert near_duplicate_pairs(logos, poses=False) == []
    joined = [g for g in near_duplicate_groups(logos) if len(g) > 1]
    # Mostly families of icons on one template and palette.
    assert sum(map(len, joined)) <= 0.08 * len(logos) and max(map(len, joined)) <= 12


def test_real_copies_are_found(shared):
    """Cropped, encoded again and half of them mirrored; the thresholds saw other draws."""
    rng = np.random.default_rng(77)
    for name, least in (("clothing", 0.95), ("logos", 0.85)):
        chosen = load_pictures(shared / name, limit=60)
        changed = []
        for picture in chosen:
            image = Image.fromarray(picture.load(128))
            cut = rng.integers(0, 5, 4)
            image = image.crop((cut[0], cut[1], 128 - cut[2], 128 - cut[3]))
            image = as_jpeg(image, int(rng.integers(50, 90)))
            changed.append(ImageOps.mirror(image) if rng.random() < 0.5 else image)
        originals = [Image.fromarray(picture.load(128)) for picture in chosen]
        pairs = near_duplicate_pairs(pictures(*originals, *changed))
        assert sum((i, i + 60) in pairs for i in range(60)) >= least * 60, name


def test_order_is_ascending():
    groups = near_duplicate_groups(pictures(*[photo(seed % 7) for seed in range(40)]))
    assert len(groups) == 7 and all(a < b for group in groups for a, b in pairwise(group))
    assert [group[0] for group in groups] == list(range(7))
