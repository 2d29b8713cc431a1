"""Weights that lie in a file and are read a tensor at a time, so that a copy of them costs no memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffward.files import atomic_path


class Stored(Mapping[str, Tensor]):
    """Tensors of a safetensors file; the system maps its pages in and may drop them again.

    Attributes:
        run: what they are of, as `write` was told; "" for nothing.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path = path
        self._file = safe_open(path, framework="pt", device=str(device))
        self._names = dict.fromkeys(self._file.keys())
        self.run: str = (self._file.metadata() or {}).get("run", "")

    @classmethod
    def write(
        cls, path: Path, weights: Mapping[str, Tensor], device: torch.device | str = "cpu", run: str = ""
    ) -> Stored:  # fmt: skip
        """Save `weights` and open them; `run` says what they are of, for whoever finds the file."""
        with atomic_path(path) as temporary:
            tensors = {n: t.detach().cpu().contiguous() for n, t in weights.items()}
            save_file(tensors, temporary, {"run": run} if run else None)
        return cls(path, device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
