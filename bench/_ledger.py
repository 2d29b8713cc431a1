"""Memory of weights: counted storage by storage, and looked up in what the system maps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch import Tensor


class Ledger(TorchDispatchMode):
    """Bytes of weights and of what is made of them: now, and at the most since it was opened.

    Args:
        parameters: whose shapes count, also transposed and as matrices of one row an output.
        held: what is there before and counts.
        ranges: addresses that do not: mapped files.
    """

    def __init__(
        self, parameters: Iterable[Tensor], held: Iterable[Tensor], ranges: Iterable[range] = ()
    ) -> None:
        super().__init__()
        parameters = list(parameters)
        self.size = sum(p.nbytes for p in parameters)
        self.now = self.peak = 0
        self._ranges, self._marked = list(ranges), False
        self._known: dict[int, tuple[int, Any]] = {}
        self._shapes = {
            shape for p in parameters
            for shape in (tuple(p.shape), tuple(p.shape)[::-1], (len(p), p.numel() // len(p)))
        }  # fmt: skip
        for tensor in held:
            self._enter(tensor)

    @property
    def copies(self) -> float:
        """The peak, in copies of the weights."""
        return self.peak / self.size

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Whatever is made within counts."""
        self._marked = True
        try:
            yield
        finally:
            self._marked = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (self._marked or tuple(tensor.shape) in self._shapes):  # fmt: skip
                self._enter(tensor)
        return made

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, address = storage._cdata, storage.data_ptr()
        if key in self._known or any(address in part for part in self._ranges):
            return
        self._known[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._leave(key))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _leave(self, key: int) -> None:
        size, _ = self._known.pop(key)
        self.now -= size


def mappings(path: Path) -> list[tuple[range, int]]:
    """Where this process maps a file, and the bytes of each mapping that became its own; none but on Linux."""
    told = Path("/proc/self/smaps")
    found: list[tuple[range, int]] = []
    inside = False
    for line in told.read_text().splitlines() if told.exists() else []:
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = bool(rest) and rest[-1] == str(path.resolve())
            if inside:
                low, high = (int(end, 16) for end in first.split("-"))
                found.append((range(low, high), 0))
        elif inside and first == "Anonymous:":
            found[-1] = found[-1][0], int(rest[0]) * 1024
    return found
