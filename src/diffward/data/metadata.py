"""Reading `metadata.jsonl` and `metadata.csv` beside pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffward.errors import InputError

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
IMAGE_COLUMNS = ("file_name",)
CAPTION_COLUMNS = ("text", "caption", "prompt")


def read_metadata(
    path: Path, image_column: str | None = None, caption_column: str | None = None
) -> tuple[list[tuple[str, str | None]], str | None]:
    """Rows as (relative picture path, caption or None), and the caption column that was used.

    Without a name, the picture column is `file_name` and the caption column the first there is of
    `text`, `caption`, `prompt` (None if there is none).

    Raises:
        InputError: not readable, no such column, or a path that leaves the folder.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    rows = list(_jsonl(path, text) if path.suffix == ".jsonl" else _csv(path, text))
    if not rows:
        raise InputError(f"{path}: holds no rows; list the pictures in it or remove it")
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    image = _column(path, columns, image_column, IMAGE_COLUMNS, "image_column")
    if image is None:
        raise InputError(
            f"{path}: no column 'file_name' (its columns: {_names(columns)}); "
            "name the one with the picture files with image_column"
        )
    caption = _column(path, columns, caption_column, CAPTION_COLUMNS, "caption_column")
    return [
        (_inside(path, line, row.get(image)), _caption(row.get(caption) if caption else None))
        for line, row in rows
    ], caption


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): it also cuts at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f"{path}: line {number} is not JSON ({str(error).splitlines()[0]}); "
                'it should read {"file_name": "…", "text": "…"}'
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: line {number} is a {type(row).__name__}, not an object; "
                'it should read {"file_name": "…", "text": "…"}'
            )
        yield number, row


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not CSV ({error})") from error


def _column(
    path: Path, columns: list[str], asked: str | None, usual: tuple[str, ...], option: str
) -> str | None:
    if asked is None:
        return next((name for name in usual if name in columns), None)
    if asked not in columns:
        raise InputError(
            f"{path}: no column {asked!r} (its columns: {_names(columns)}); name one with {option}"
        )
    return asked


def _names(columns: list[str]) -> str:
    shown = ", ".join(repr(column) for column in columns[:12])
    return shown + (", …" if len(columns) > 12 else "")


def _inside(path: Path, line: int, value: Any) -> str:
    """The value as a normal relative path; refuses what would leave the folder."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise InputError(f"{path}: line {line} names no picture file; fill it in or remove it")
    windows = PureWindowsPath(value)
    if windows.drive or windows.root or PurePosixPath(value).is_absolute() or ".." in windows.parts:
        raise InputError(
            f"{path}: line {line} names {value!r}, which leaves the folder; "
            "give paths relative to the metadata file, without '..'"
        )
    if "\\" in value and not (path.parent / value).is_file():
        value = windows.as_posix()  # written on Windows
    return str(PurePosixPath(value))


def _caption(value: Any) -> str | None:
    if isinstance(value, list):
        value = next((item for item in value if item), None)
    if value is None:
        return None
    return " ".join(str(value).split()) or None
