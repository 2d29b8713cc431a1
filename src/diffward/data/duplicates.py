"""Which pictures are too alike to be divided between members and non-members.

Two pictures are joined if they are
1. the same bytes;
2. the same picture after re-encoding, resizing, mirroring, a slight crop or a change of brightness;
3. the same drawing or scene in another pose: alike in shape, and of the same palette.

All is measured on thumbnails of 32 x 32 pixels; groups are what such pairs connect. The thresholds
were chosen on transformed copies of photographs and logos against distinct ones (2), and on drawn
figures in several poses against other figures (3), where at most one pair of distinct figures in
5,000 was to be joined.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from diffward.data.decode import decode
from diffward.data.pictures import THUMBNAIL, Picture

#: Correlation at 16 x 16 pixels from which a pair is looked at more closely.
CANDIDATE = 0.80
#: A copy: correlation after the best crop, and largest error of a block (levels of 255, RMS).
COPY_CORRELATION, COPY_BLOCK_ERROR = 0.94, 40.0
#: The same drawing: correlation as it lies, share of the palette in common, the two together, and
#: the share in common without the commonest colour.
POSE_CORRELATION, POSE_PALETTE, POSE_SUM, POSE_FIGURE = 0.80, 0.80, 1.74, 0.65
#: Pictures that vary less than this many levels are compared by their colours instead.
FLAT, FLAT_DIFFERENCE = 3.0, 6.0
#: A copy may be brighter or darker by this many levels and stretched by such a factor.
BRIGHTNESS, CONTRAST = 48.0, (0.7, 1.4)

_ROWS = 512
#: Shares cut from left, top, right and bottom that are tried, the steps of the search after that,
#: and what it may gain in correlation.
_CUTS_OF = list(itertools.product((0.0, 0.03, 0.06), repeat=4))
_STEPS = (0.015, 0.015, 0.0075, 0.004)
_MARGIN = 0.07
_BINS = 8


def near_duplicate_groups(pictures: Sequence[Picture], *, poses: bool = True) -> list[list[int]]:
    """Divide `pictures` into groups of near-duplicates, mirror images included.

    Args:
        pictures: with thumbnails, or readable (then they are read).
        poses: also join the same drawing or scene in another pose (rule 3).

    Returns:
        All indices, each in one group; groups and their members in ascending order. A picture like
        no other is a group of one.
    """
    thumbs = np.stack([thumbnail(picture) for picture in pictures]) if len(pictures) else None
    parents = list(range(len(pictures)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(a: int, b: int) -> None:
        low, high = sorted((root(a), root(b)))
        parents[high] = low

    seen: dict[str, int] = {}
    for index, picture in enumerate(pictures):
        join(seen.setdefault(picture.sha256, index), index)
    if thumbs is not None:
        for a, b in _pairs(thumbs, poses):
            if root(a) != root(b):
                join(a, b)
    groups: dict[int, list[int]] = {}
    for index in range(len(pictures)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def near_duplicate_pairs(
    pictures: Sequence[Picture], *, poses: bool = True
) -> list[tuple[int, int]]:
    """The pairs (a < b) of near-duplicates themselves, before they are connected to groups."""
    if not pictures:
        return []
    thumbs = np.stack([thumbnail(picture) for picture in pictures])
    return sorted(_pairs(thumbs, poses))


def thumbnail(picture: Picture) -> np.ndarray:
    """uint8 (32, 32, 3) of the whole picture, squeezed."""
    if picture.thumbnail is not None:
        return picture.thumbnail
    image = decode(picture.path.read_bytes(), at_least=2 * THUMBNAIL)
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def _pairs(thumbs: np.ndarray, poses: bool) -> Iterator[tuple[int, int]]:
    yield from _flat_pairs(thumbs)
    palettes = _palettes(thumbs) if poses else None
    for a, others in _candidates(thumbs):
        mirrored = thumbs[others][:, :, ::-1]
        faces = np.concatenate([thumbs[others], mirrored])
        towards = _unit(faces) @ _unit(thumbs[a][None])[0]
        as_it_lies = np.maximum(*np.split(towards, 2))
        same = np.zeros(len(others), dtype=bool)
        if palettes is not None:
            same |= _same_drawing(as_it_lies, np.minimum(palettes[others], palettes[a]))
        rest = np.flatnonzero(~same)
        if len(rest):
            same[rest] = _are_copies(thumbs[a], thumbs[others[rest]])
        for b in others[same]:
            yield a, int(b)


def _flat_pairs(thumbs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of pictures that are (nearly) one colour: they have no shape to correlate."""
    pixels = thumbs.reshape(len(thumbs), -1, 3).astype(np.float32)
    colours = pixels.mean(1)
    flat = np.flatnonzero(pixels.std(1).max(1) < FLAT)
    for position, a in enumerate(flat):
        others = flat[position + 1 :]
        near = np.abs(colours[others] - colours[a]).max(1, initial=0) < FLAT_DIFFERENCE
        for b in others[near]:
            yield int(a), int(b)


def _candidates(thumbs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(a, all b > a that resemble a at 16 x 16 pixels, as it lies or mirrored)."""
    n = len(thumbs)
    coarse = thumbs.reshape(n, THUMBNAIL // 2, 2, THUMBNAIL // 2, 2, 3).mean(
        (2, 4), dtype=np.float32
    )
    straight, mirrored = _unit(coarse), _unit(coarse[:, :, ::-1])
    for start in range(0, n, _ROWS):
        rows = straight[start : start + _ROWS]
        alike = np.maximum(rows @ straight[start:].T, rows @ mirrored[start:].T) > CANDIDATE
        for row in range(len(rows)):
            others = np.flatnonzero(alike[row, row + 1 :]) + start + row + 1
            if len(others):
                yield start + row, others


def _same_drawing(correlation: np.ndarray, common: np.ndarray) -> np.ndarray:
    """bool (n,) from correlations (n,) and the palettes' overlaps (n, 512)."""
    shared, ground = common.sum(1), common.max(1)
    # Words in black on white share the white; what lies on the ground must agree as well.
    figure = (shared - ground) / np.maximum(1 - ground, 1e-3)
    return (
        (correlation > POSE_CORRELATION)
        & (shared > POSE_PALETTE)
        & (correlation + shared > POSE_SUM)
        & (figure > POSE_FIGURE)
    )


def _are_copies(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool (n,): which of uint8 `others` (n, 32, 32, 3) show the same picture as `one`.

    Each is tried against the other with up to 6 % cut from each side, and mirrored. The largest
    error of a block tells a copy from a drawing on the same template with another sign in it.
    """
    n = len(others)
    faces = np.concatenate([others, others[:, :, ::-1]])
    scores = (_unit(_crops(one)) @ _unit(faces).T).reshape(-1, 2, n).max((0, 1))
    # Only what comes near is worth the other way round and the fine search.
    near = scores > COPY_CORRELATION - _MARGIN
    return np.array(
        [
            bool(near[index]) and (_shows(one, other) or _shows(other, one))
            for index, other in enumerate(others)
        ]
    )


def _shows(source: np.ndarray, target: np.ndarray) -> bool:
    """Whether some crop of `source` is `target`, as it lies or mirrored."""
    faces = np.stack([target, target[:, ::-1]])
    units = _unit(faces)
    scores = _unit(_crops(source)) @ units.T
    best, face = divmod(int(scores.argmax()), 2)
    if scores[best, face] < COPY_CORRELATION - _MARGIN:
        return False
    image, score = Image.fromarray(source), float(scores[best, face])
    cuts, crop = np.array(_CUTS_OF[best]), _crop(image, _CUTS_OF[best])
    # The grid is coarser than a pixel; lines need better than that to lie on one another.
    for step in _STEPS:
        for side, sign in itertools.product(range(4), (step, -step)):
            moved = cuts.copy()
            moved[side] = max(0.0, moved[side] + sign)
            candidate = _crop(image, moved)
            improved = float(_unit(candidate[None])[0] @ units[face])
            if improved > score:
                cuts, crop, score = moved, candidate, improved
    return score > COPY_CORRELATION and _alike_everywhere(crop, faces[face])


def _crops(thumb: np.ndarray) -> np.ndarray:
    image = Image.fromarray(thumb)
    return np.stack([_crop(image, cuts) for cuts in _CUTS_OF])


def _crop(image: Image.Image, cuts: Sequence[float] | np.ndarray) -> np.ndarray:
    """`image` without these shares of its left, top, right and bottom, at its old size."""
    left, top, right, bottom = (float(cut) * THUMBNAIL for cut in cuts)
    box = (left, top, THUMBNAIL - right, THUMBNAIL - bottom)
    return np.asarray(image.resize(image.size, Image.Resampling.BILINEAR, box=box))


def _alike_everywhere(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether no block of 4 x 4 pixels differs much once brightness and contrast are fitted."""
    a, b = one.astype(np.float32), other.astype(np.float32)
    shift = float(b.mean() - a.mean())
    a, b = a - a.mean(), b - b.mean()
    gain = np.clip(float((a * b).sum()) / max(float((a * a).sum()), 1e-6), *CONTRAST)
    blocks = ((b - gain * a) ** 2).reshape(8, 4, 8, 4, 3).mean((1, 3, 4))
    return abs(shift) < BRIGHTNESS and float(blocks.max()) < COPY_BLOCK_ERROR**2


def _unit(batch: np.ndarray) -> np.ndarray:
    """float32 (n, -1): each row without its mean, of length one (zero where it is flat)."""
    rows = batch.reshape(len(batch), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)


def _palettes(thumbs: np.ndarray) -> np.ndarray:
    """float32 (n, 512): share of the pixels at each of 8 x 8 x 8 colours, divided between
    neighbouring bins so that a little noise changes little."""
    n = len(thumbs)
    position = thumbs.reshape(n, -1, 3).astype(np.float32) / 256 * _BINS - 0.5
    low = np.floor(position).astype(np.int64)
    part = position - low
    palettes = np.zeros((n, _BINS**3), dtype=np.float32)
    for corner in itertools.product((0, 1), repeat=3):
        bins = np.clip(low + np.array(corner), 0, _BINS - 1) @ np.array([_BINS**2, _BINS, 1])
        weights = np.where(np.array(corner, dtype=bool), part, 1 - part).prod(-1)
        for row in range(n):
            palettes[row] += np.bincount(bins[row], weights[row], _BINS**3)
    return palettes / position.shape[1]
