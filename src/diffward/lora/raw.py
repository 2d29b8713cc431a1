"""Tensor bytes as float32 NumPy arrays, one tensor at a time, without torch.

Plain reads instead of a memory map: mapped pages of a file would count as resident memory.
"""

from __future__ import annotations

import os
from io import FileIO

import numpy as np

from diffward.errors import InputError
from diffward.lora.header import TensorInfo

_NUMPY = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
}


def _fp8_table(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """All 256 values of an 8-bit float. E4M3 is the `fn` variant: no infinities, NaN at 0x7f."""
    bias = 2 ** (exponent_bits - 1) - 1
    table = np.zeros(256, np.float32)
    for code in range(256):
        sign = -1.0 if code >> 7 else 1.0
        exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
        mantissa = code & (2**mantissa_bits - 1)
        if exponent == 0:
            value = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
        else:
            value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        if exponent == 2**exponent_bits - 1:
            if exponent_bits == 5:
                value = float("inf") if mantissa == 0 else float("nan")
            elif mantissa == 2**mantissa_bits - 1:
                value = float("nan")
        table[code] = sign * value
    return table


_FP8 = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}


def to_float32(buffer: bytes, dtype: str) -> np.ndarray:
    """Decode a flat buffer of a safetensors dtype to float32."""
    if dtype == "BF16":
        return (np.frombuffer(buffer, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in _FP8:
        return _fp8_table(*_FP8[dtype])[np.frombuffer(buffer, np.uint8)]
    return np.frombuffer(buffer, _NUMPY[dtype]).astype(np.float32)


def read_bytes(file: FileIO, start: int, count: int) -> bytes:
    """Read exactly `count` bytes at `start`; `InputError` if the file became shorter."""
    file.seek(start)
    data = file.read(count) or b""
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    if len(data) != count:
        raise InputError(f"{file.name}: ended early at byte {start + len(data):,}; truncated?")
    return data


def read_tensor(file: FileIO, info: TensorInfo) -> np.ndarray:
    """One tensor as float32 in its shape. `InputError` names a tensor that holds NaN or infinity."""
    array = to_float32(read_bytes(file, info.start, info.nbytes), info.dtype).reshape(info.shape)
    check_finite(array, info.name, file.name)
    return array


def check_finite(array: np.ndarray, tensor: str, path: str | os.PathLike[str]) -> None:
    # A sum is finite only if every term is, and costs a fraction of isfinite; overflow is rechecked.
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total) and not np.isfinite(array).all():
        raise InputError(
            f"{path}: tensor {tensor!r} holds NaN or infinity; the training broke, use an earlier save"
        )


def is_all_zero(file: FileIO, info: TensorInfo) -> bool:
    """Whether a tensor is zero everywhere; reads one page, and more only while it finds zeros."""
    position, step = info.start, 4096
    while position < info.end:
        block = read_bytes(file, position, min(step, info.end - position))
        # Bytes first: cheap, and a block that is not all zero bytes may still hold only -0.0.
        if block.count(0) != len(block) and to_float32(block, info.dtype).any():
            return False
        position += len(block)
        step = 1 << 20
    return True
