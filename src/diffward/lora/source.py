"""Where tensors come from: a safetensors file read on demand, or an unpickled file held in memory."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from diffward.errors import InputError
from diffward.lora import raw
from diffward.lora.header import Header, read_header

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Named tensors. `shapes` and `dtypes` (safetensors names) cost nothing, the rest reads data."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    def nbytes(self, key: str) -> int: ...
    def array(self, key: str) -> np.ndarray: ...
    def tensor(self, key: str) -> torch.Tensor: ...
    def is_zero(self, key: str) -> bool: ...


class SafetensorsSource:
    """Reads one tensor at a time; nothing is kept but the open file."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.path = header.path
        # Unbuffered: most reads are of a few bytes in a new place, or of a whole tensor.
        self._file = header.path.open("rb", buffering=0)
        self.shapes = {name: info.shape for name, info in header.tensors.items()}
        self.dtypes = {name: info.dtype for name, info in header.tensors.items()}
        self.metadata = header.metadata

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def nbytes(self, key: str) -> int:
        return self.header.tensors[key].nbytes

    def array(self, key: str) -> np.ndarray:
        """float32, in the tensor's shape. Raises `InputError` on NaN."""
        return raw.read_tensor(self._file, self.header.tensors[key])

    def is_zero(self, key: str) -> bool:
        return raw.is_all_zero(self._file, self.header.tensors[key])

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor in its own dtype."""
        import torch

        dtypes = {
            "BOOL": torch.bool,
            "U8": torch.uint8,
            "I8": torch.int8,
            "I16": torch.int16,
            "U16": torch.uint16,
            "I32": torch.int32,
            "U32": torch.uint32,
            "I64": torch.int64,
            "U64": torch.uint64,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
            "F32": torch.float32,
            "F64": torch.float64,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
        }
        info = self.header.tensors[key]
        data = bytearray(raw.read_bytes(self._file, info.start, info.nbytes))
        if not data:
            return torch.empty(info.shape, dtype=dtypes[info.dtype])
        return torch.frombuffer(data, dtype=dtypes[info.dtype]).reshape(info.shape)


class PickleSource:
    """Tensors of a pickle that `torch.load(weights_only=True)` accepted."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor], is_list: bool) -> None:
        self.path = path
        self.is_list = is_list
        self.metadata: dict[str, str] = {}
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: _dtype_name(tensor) for name, tensor in tensors.items()}

    def nbytes(self, key: str) -> int:
        tensor = self._tensors[key]
        return tensor.numel() * tensor.element_size()

    def array(self, key: str) -> np.ndarray:
        array = self._tensors[key].float().numpy()
        raw.check_finite(array, key, self.path)
        return array

    def tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def is_zero(self, key: str) -> bool:
        return not bool(self._tensors[key].any())


def _dtype_name(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}.get(
        name, name.upper()
    )


def open_source(path: Path) -> Source:
    """Open one weights file, told apart by its first bytes. Raises `InputError`."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not head:
        raise InputError(f"{path}: is empty; download it again")
    # The length of a safetensors header may begin with the bytes of a pickle (640 = 80 02 …).
    length = int.from_bytes(head[:8], "little")
    if length + 8 > path.stat().st_size or head[8:9] != b"{":
        pickled = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        if head[:4] == b"PK\x03\x04" or pickled:
            return _open_pickle(path)
        if head.lstrip()[:1] in (b"[", b"{"):
            raise InputError(f"{path}: is a JSON file, not weights; give the .safetensors file")
    return SafetensorsSource(read_header(path))


def _open_pickle(path: Path) -> PickleSource:
    import torch

    size = path.stat().st_size
    try:
        unpacked = _unpacked_size(path)
        if unpacked > 4 * size + 1_000_000:
            raise InputError(f"{path}: unpacks to far more than its size; refused")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # weights_only runs a restricted unpickler: tensors and containers, never code.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged archives and pickles fail in many ways
        raise InputError(_pickle_error(path, error)) from None
    return PickleSource(path, *_tensors_of(path, loaded, size))


def _unpacked_size(path: Path) -> int:
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _pickle_error(path: Path, error: Exception) -> str:
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|(?:instruction|opcode|class|function)[: ]+`?([\w.]+)", text)
    if "weights_only" in text.lower() or "Unsupported" in text:
        name = next((group for group in found.groups() if group), None) if found else None
        what = f" (it calls {name})" if name else ""
        return (
            f"{path}: is a pickle that would run code{what} and is refused; "
            "ask for a .safetensors file"
        )
    first = text.strip().splitlines()[0][:100] if text.strip() else type(error).__name__
    first = "".join(c if c.isprintable() else "?" for c in first)
    return f"{path}: is a damaged PyTorch file ({first}); download it again"


def _tensors_of(path: Path, loaded: Any, size: int) -> tuple[dict[str, torch.Tensor], bool]:
    import torch

    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if isinstance(loaded, dict) and isinstance(loaded.get("string_to_param"), dict):
        # A1111's textual inversion: {"string_to_param": {"*": tensor}, "name": …}
        loaded = {f"<{loaded.get('name') or '*'}>": next(iter(loaded["string_to_param"].values()))}
    is_list = isinstance(loaded, list | tuple)
    items = enumerate(loaded) if is_list else loaded.items() if isinstance(loaded, dict) else ()
    tensors = {str(key): value.detach() for key, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors, so it is not a LoRA")
    if is_list and len(tensors) != len(loaded):
        raise InputError(
            f"{path}: a list that holds other things than tensors, so it is not a LoRA"
        )
    for key, tensor in tensors.items():
        if not key.isprintable() or len(key) > 1000:
            raise InputError(f"{path}: tensor {key[:80]!r} has no printable name")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise InputError(f"{path}: tensor {key!r} is of an unsupported kind")
        # A stride of zero lets a tiny file describe a tensor of any size.
        if tensor.numel() * tensor.element_size() > 2 * size + 1_000_000:
            raise InputError(f"{path}: tensor {key!r} claims to be larger than the file; refused")
    return tensors, is_list


def archive_root(path: Path) -> str | None:
    """The folder name inside a `torch.save` archive: the file's own name when it was first saved."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[0].split("/")[0]
    except (OSError, zipfile.BadZipFile, ValueError, IndexError, NotImplementedError):
        return None
