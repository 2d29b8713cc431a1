"""The safetensors header, parsed by hand: eight bytes of length, JSON, then the data section.

Nothing here reads tensor data, so a file of any size costs milliseconds, and every promise of the
header is checked against the file before it is believed.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffward.errors import InputError

# The reference reader refuses larger headers too.
MAX_HEADER_BYTES = 100_000_000

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `end` are offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed header. `tensors` keeps the order of the file's JSON."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def read_header(path: str | Path) -> Header:
    """Parse and check the header of a safetensors file.

    Raises `InputError` for a file that is too short, whose header length lies, whose header is not
    the JSON it should be, or whose tensor offsets overlap, leave holes or point outside the file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise InputError(
                    f"{path}: only {size} bytes, not a safetensors file; download it again"
                )
            length = struct.unpack("<Q", prefix)[0]
            if length > size - 8 or length > MAX_HEADER_BYTES:
                raise InputError(
                    f"{path}: the header claims {length:,} bytes but the file has {size:,}; "
                    "it is truncated or not a safetensors file"
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path}: the safetensors header is not valid JSON ({reason})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: the safetensors header is not a JSON object")
    data_start = 8 + length
    metadata = _metadata(path, raw)
    tensors = {
        name: _tensor_info(path, name, entry, data_start, size)
        for name, entry in raw.items()
        if name != "__metadata__"
    }
    _check_layout(path, tensors, data_start, size)
    return Header(path, tensors, metadata, data_start, size)


def _metadata(path: Path, raw: dict[str, Any]) -> dict[str, str]:
    metadata = raw.get("__metadata__", {})
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: __metadata__ of the header is not a JSON object")
    # Other writers put numbers and objects there; keep them readable instead of refusing the file.
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    where = f"{path}: header entry {name[:80]!r}"
    # Names are printed in reports and errors; no tool writes control characters into them.
    if not name.isprintable() or len(name) > 1000:
        raise InputError(f"{where} has no printable name")
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not a tensor description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(_is_count(n) for n in shape):
        raise InputError(f"{where} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise InputError(f"{where} has no valid data_offsets")
    start, end = offsets
    if end < start or data_start + end > size:
        raise InputError(
            f"{where} points outside the file (ends at byte {data_start + end:,} of {size:,}); "
            "the file is truncated or its header lies"
        )
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - start:
        raise InputError(f"{where}: shape {shape} of {dtype} does not fill its {end - start} bytes")
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start < position:
            raise InputError(f"{path}: tensor {info.name[:80]!r} overlaps another; the header lies")
        if info.start > position:
            raise InputError(f"{path}: unexplained bytes before tensor {info.name[:80]!r}")
        position = info.end
    if position != size:
        raise InputError(
            f"{path}: {size - position:,} bytes after the last tensor belong to nothing; "
            "the file is damaged or hides data"
        )
