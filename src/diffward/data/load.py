"""One call from a folder or a hub id to readable pictures."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from diffward.data.decode import SUFFIXES, UnreadableError, decode, quiet_pillow
from diffward.data.layouts import Entry, Listing, list_folder
from diffward.data.pictures import THUMBNAIL, Picture, Pictures
from diffward.errors import InputError

MAX_BYTES = 512 * 1024 * 1024
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def load_pictures(
    source: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    default_caption: str = "",
    limit: int | None = None,
) -> Pictures:
    """List, hash and check the pictures of a folder or of a hub dataset.

    Every file is read once and decoded once (at reduced size); what cannot be used is named in
    `.skipped`, what was detected in `.layout`. The order is that of the relative paths.

    Args:
        source: a folder, or a hub dataset id `org/name` where no such folder exists.
        image_column: column of the metadata with the picture files (default `file_name`).
        caption_column: column with the captions (default `text`, else `caption`, `prompt`).
        default_caption: for pictures without a caption of their own.
        limit: at most so many pictures, drawn by a hash of their names: the same ones each time,
            and not the first class of a folder sorted by class.

    Raises:
        InputError: no such folder, nothing in it, nothing readable in it, unusable metadata.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} is not positive; leave it out or give at least 1")
    text = os.fspath(source)
    root = Path(text).expanduser()
    if root.is_dir():
        listing = list_folder(root, image_column, caption_column)
    elif root.exists():
        raise InputError(
            f"{text}: is a file, not a folder; give the folder that holds the pictures"
        )
    elif _HUB_ID.match(text) and not root.parent.is_dir():
        from diffward.data.hub import list_hub

        listing = list_hub(text, image_column, caption_column, limit)
    else:
        raise InputError(f"{text}: no such folder; check the path")
    return _read(text, listing, default_caption, limit)


def _read(source: str, listing: Listing, default_caption: str, limit: int | None) -> Pictures:
    entries = listing.entries
    if not entries:
        others = f" ({len(listing.skipped)} other files)" if listing.skipped else ""
        raise InputError(
            f"{source}: no pictures in it{others}; put {', '.join(sorted(SUFFIXES))} files there"
        )
    notes = list(listing.notes)
    if limit is not None and limit < len(entries):
        notes.append(f"limited to {limit} of {len(entries)} pictures")
        entries = sorted(entries, key=lambda e: hashlib.sha256(e.name.encode()).digest())
    pictures: list[Picture] = []
    skipped = list(listing.skipped)
    # Pillow frees the interpreter while it decodes; a chunk at a time bounds the memory.
    workers = min(4, os.cpu_count() or 1)
    stream = iter(entries)
    with quiet_pillow(), ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(stream, _chunk(limit, len(pictures)))):
            for entry, result in zip(chunk, pool.map(lambda e: _open(e, default_caption), chunk)):
                if isinstance(result, str):
                    skipped.append((entry.name, result))
                else:
                    pictures.append(result)
            if limit is not None and len(pictures) >= limit:
                break
    if not pictures:
        name, reason = skipped[-1]
        raise InputError(
            f"{source}: none of its {len(entries)} pictures can be read (such as {name}: {reason}); "
            "repair or replace them"
        )
    pictures.sort(key=lambda picture: picture.name)
    notes.extend(_remarks(pictures))
    layout = listing.kind.replace("{n}", f"{len(pictures):,}").replace(
        ": 1 pictures", ": 1 picture"
    )
    return Pictures(pictures, layout, sorted(skipped), notes)


def _chunk(limit: int | None, have: int) -> int:
    return 256 if limit is None else max(1, min(256, limit - have))


def _open(entry: Entry, default_caption: str) -> Picture | str:
    """The picture, or the reason why it is left out."""
    try:
        status = entry.path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            return "not a regular file"
        if status.st_size > MAX_BYTES:
            return f"{status.st_size >> 20} MiB, more than the {MAX_BYTES >> 20} MiB read"
        data = entry.path.read_bytes()
        image = decode(data, at_least=2 * THUMBNAIL)
        small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except UnreadableError as error:
        return str(error)
    return Picture(
        path=entry.path,
        caption=entry.caption if entry.caption is not None else default_caption,
        sha256=hashlib.sha256(data).hexdigest(),
        repeats=entry.repeats,
        name=entry.name,
        thumbnail=np.asarray(small),
    )


def _remarks(pictures: Iterable[Picture]) -> list[str]:
    pictures = list(pictures)
    remarks = []
    copies = len(pictures) - len({picture.sha256 for picture in pictures})
    if copies:
        remarks.append(f"{copies} files are exact copies of others")
    bare = sum(not picture.caption for picture in pictures)
    if 0 < bare < len(pictures):
        remarks.append(f"{bare} of {len(pictures)} pictures have an empty caption")
    return remarks
