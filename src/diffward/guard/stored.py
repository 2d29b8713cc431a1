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
    """Tensors of a safetensors file; the system maps its pages in and may drop them again."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path = path
        self._file = safe_open(path, framework="pt", device=str(device))
        self._names = dict.fromkeys(self._file.keys())

    @classmethod
    def write(
        cls, path: Path, weights: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> Stored:
        """Save `weights` and open them."""
        with atomic_path(path) as temporary:
            save_file({n: t.detach().cpu().contiguous() for n, t in weights.items()}, temporary)
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
