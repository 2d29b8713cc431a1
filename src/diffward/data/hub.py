"""Pictures of a hub dataset, through the optional `datasets` package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from diffward.data.cache import cache_root
from diffward.data.layouts import Entry, Listing
from diffward.data.metadata import CAPTION_COLUMNS
from diffward.errors import InputError
from diffward.files import atomic_path

IMAGE_COLUMNS = ("image", "img", "picture")


def list_hub(
    dataset_id: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    limit: int | None = None,
) -> Listing:
    """Fetch split `train` (else the first one) and lay its pictures out as files in the cache.

    Files are named by the hash of their bytes, so that nothing is stored twice.

    Raises:
        InputError: `datasets` is not installed, the dataset is out of reach, or it has no such
            columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{dataset_id}: no such folder; to read it as a hub dataset install the package "
            "'datasets' (pip install 'diffward[hub]')"
        ) from error
    try:
        splits = datasets.load_dataset(dataset_id)
    except Exception as error:  # no network, no such dataset, gated, a script: each its own class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{dataset_id}: no such folder, and not to be had from the hub ({reason}); "
            "check the name, the network and your access"
        ) from error
    split = "train" if "train" in splits else next(iter(splits))
    rows = splits[split]
    columns = list(rows.column_names)
    image = _pick(dataset_id, columns, image_column, IMAGE_COLUMNS, "image_column")
    caption = _pick(dataset_id, columns, caption_column, CAPTION_COLUMNS, "caption_column")
    if image is None:
        raise InputError(
            f"{dataset_id}: no column 'image' (its columns: {', '.join(columns)}); "
            "name the one with the pictures with image_column"
        )
    rows = rows.cast_column(image, datasets.Image(decode=False))
    order = sorted(range(len(rows)), key=lambda row: hashlib.sha256(b"%d" % row).digest())
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    for row in order:
        if limit is not None and len(entries) >= limit:
            break
        name = f"{split}/{row:07d}"
        data = _bytes(rows[row][image])
        if data is None:
            skipped.append((name, "holds no picture"))
            continue
        text = rows[row][caption] if caption else None
        words = " ".join(str(text).split()) or None if text is not None else None
        entries.append(Entry(_store(data), name, words))
    captions = f"captions from column {caption!r}" if caption else "no captions"
    kind = f"hub dataset, split '{split}': {{n}} pictures, {captions}"
    return Listing(sorted(entries, key=lambda entry: entry.name), kind, sorted(skipped))


def _pick(
    dataset_id: str, columns: list[str], asked: str | None, usual: tuple[str, ...], option: str
) -> str | None:
    if asked is None:
        return next((name for name in usual if name in columns), None)
    if asked not in columns:
        raise InputError(
            f"{dataset_id}: no column {asked!r} (its columns: {', '.join(columns)}); "
            f"name one with {option}"
        )
    return asked


def _bytes(cell: Any) -> bytes | None:
    if not isinstance(cell, dict):
        return None
    if cell.get("bytes"):
        return bytes(cell["bytes"])
    path = cell.get("path")
    return Path(path).read_bytes() if path and Path(path).is_file() else None


def _store(data: bytes) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    path = cache_root() / "pictures" / digest[:2] / digest
    if not path.is_file() or path.stat().st_size != len(data):
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return path
