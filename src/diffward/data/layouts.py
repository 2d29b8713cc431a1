"""Which files of a folder are pictures, and which caption goes with each.

A layout is told by what is there: `metadata.jsonl`/`.csv`, kohya's `10_name` repeat folders,
`.txt`/`.caption` files beside the pictures, or pictures alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from diffward.data.decode import SUFFIXES
from diffward.data.metadata import METADATA_FILES, read_metadata
from diffward.errors import InputError

SIDECARS = (".txt", ".caption")
_REPEATS = re.compile(r"^(\d{1,3})_(.+)$")  # up to 999: "2023_summer" is an album, not a repeat


@dataclass(frozen=True)
class Entry:
    """A file that should be a picture, not opened yet. `caption` is None where there is none."""

    path: Path
    name: str
    caption: str | None = None
    repeats: int = 1


@dataclass
class Listing:
    """What a folder holds: the entries by name, the kind of layout in words, and what was left."""

    entries: list[Entry]
    kind: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_folder(
    root: Path, image_column: str | None = None, caption_column: str | None = None
) -> Listing:
    """Detect the layout of `root` and list its pictures in the order of their relative paths.

    Raises:
        InputError: the metadata cannot be used, or columns were named and there is no metadata.
    """
    files = _walk(root)
    metadata = _metadata_of(files)
    if metadata:
        listing = _list_metadata(root, files, metadata, image_column, caption_column)
    else:
        asked = image_column or caption_column
        if asked:
            raise InputError(
                f"{root}: a column '{asked}' was named but there is no metadata.jsonl or "
                "metadata.csv; leave the column out or add the file"
            )
        listing = _list_plain(root, files)
    listing.entries.sort(key=lambda entry: entry.name)
    listing.skipped.sort()
    return listing


def _walk(root: Path) -> dict[str, Path]:
    """All files below `root`, relative name to path, without hidden ones and system litter."""
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini"):
                continue
            path = Path(folder) / name
            files[path.relative_to(root).as_posix()] = path
    return files


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its rights")


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def _metadata_of(files: dict[str, Path]) -> dict[str, Path]:
    """One metadata file a folder; `metadata.jsonl` wins over `metadata.csv`."""
    found: dict[str, Path] = {}
    for wanted in METADATA_FILES:
        for name, path in files.items():
            if PurePosixPath(name).name == wanted:
                found.setdefault(str(PurePosixPath(name).parent), path)
    return found


def _list_metadata(
    root: Path,
    files: dict[str, Path],
    metadata: dict[str, Path],
    image_column: str | None,
    caption_column: str | None,
) -> Listing:
    listing = Listing([], "")
    seen: set[str] = set()
    columns: set[str | None] = set()
    kinds: set[str] = set()
    for folder, path in sorted(metadata.items()):
        rows, column = read_metadata(path, image_column, caption_column)
        columns.add(column)
        kinds.add(path.name)
        for relative, caption in rows:
            name = str(PurePosixPath(folder) / relative)
            if name not in files:
                listing.skipped.append((name, f"listed in {path.name} but not there"))
            elif name in seen:
                listing.notes.append(f"{name} is listed twice; the first caption is used")
            else:
                seen.add(name)
                listing.entries.append(Entry(files[name], name, caption))
    used = {path.relative_to(root).as_posix() for path in metadata.values()}
    for name in files:
        if name in seen or name in used:
            continue
        reason = "not listed in the metadata" if _is_picture(name) else "not a picture"
        listing.skipped.append((name, reason))
    named = sorted(column for column in columns if column)
    captions = f"captions from column {' and '.join(map(repr, named))}" if named else "no captions"
    listing.kind = f"imagefolder with {' and '.join(sorted(kinds))}: {{n}} pictures, {captions}"
    return listing


def _list_plain(root: Path, files: dict[str, Path]) -> Listing:
    """Plain folders with or without caption files, and kohya's repeat folders."""
    pictures = [name for name in files if _is_picture(name)]
    sidecars = _sidecars(files)
    repeat_folders = _repeat_folders(root, pictures)
    listing = Listing([], "")
    used: set[str] = set()
    for name in pictures:
        sidecar = sidecars.get(str(PurePosixPath(name).with_suffix("")))
        caption = None
        if sidecar is not None:
            used.add(sidecar)
            caption = _read_caption(files[sidecar])
        repeats, concept = repeat_folders.get(_top(name), (1, None))
        listing.entries.append(Entry(files[name], name, caption or concept, repeats))
    with_caption = len(used)
    for name in files:
        if not _is_picture(name) and name not in used:
            listing.skipped.append((name, _why_not(name)))
    missing = len(pictures) - with_caption
    if repeat_folders:
        listing.kind = (
            f"kohya repeat folders ({len(repeat_folders)}): {{n}} pictures, "
            f"{with_caption} captions from files, {missing} from the folder's name"
        )
    elif with_caption:
        endings = " and ".join(sorted({PurePosixPath(name).suffix.lower() for name in used}))
        listing.kind = f"folder with {endings} captions: {{n}} pictures"
        if missing:
            listing.notes.append(f"{missing} of {len(pictures)} pictures have no caption file")
    else:
        listing.kind = "folder of pictures: {n} pictures, no captions"
    return listing


def _sidecars(files: Iterable[str]) -> dict[str, str]:
    """Name without suffix to the caption file of that name; `.txt` wins over `.caption`."""
    found: dict[str, str] = {}
    for suffix in SIDECARS:
        for name in files:
            if PurePosixPath(name).suffix.lower() == suffix:
                found.setdefault(str(PurePosixPath(name).with_suffix("")), name)
    return found


def _repeat_folders(root: Path, pictures: list[str]) -> dict[str, tuple[int, str]]:
    """Top folder to (repeats, concept) if every picture lies in such a folder, else nothing.

    The key "" stands for the root, which may be a repeat folder itself.
    """
    tops = {_top(name) for name in pictures}
    found: dict[str, tuple[int, str]] = {}
    for top in tops:
        match = _REPEATS.match(top or root.resolve().name)
        if match is None or int(match[1]) < 1:
            return {}
        found[top] = (int(match[1]), match[2])
    return found


def _top(name: str) -> str:
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else ""


def _read_caption(path: Path) -> str | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return " ".join(data.decode("utf-16", "replace").split()) or None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return " ".join(text.split()) or None


def _why_not(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in SIDECARS:
        return "caption file without its picture"
    if suffix in (".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".jp2", ".tga"):
        return f"format {suffix} is not read; convert it to PNG or JPEG"
    return "not a picture"
