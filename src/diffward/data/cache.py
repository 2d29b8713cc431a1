"""What is costly to compute from a picture or a caption, computed once and kept on disk.

One namespace is one folder of shards. A shard is a safetensors file with the entries of one
batch, named by the hash of their keys, so that file names tell nothing of pictures. Shards are
written whole or not at all and never changed: two processes may share a folder, the worst that
happens is that an entry is computed twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffward.errors import InputError
from diffward.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    import torch

_SHARD_SUFFIX = ".safetensors"
_MAX_HEADER = 100_000_000


def cache_root() -> Path:
    """`$DIFFWARD_CACHE`, else `~/.cache/diffward`."""
    chosen = os.environ.get("DIFFWARD_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "diffward"


class FeatureCache:
    """Tensors of one shape and dtype by key, kept in memory and, with a root, on disk.

    The namespace must name all that the values depend on besides the keys: what is computed, the
    base's identity, the picture size. Changing any of them is another namespace.
    """

    def __init__(self, root: Path | None, namespace: str) -> None:
        """
        Args:
            root: folder of the cache, such as `cache_root() / "features"`; None: memory only.
            namespace: such as "latents/<hash of the base>/512".
        """
        self.namespace = namespace
        self.folder: Path | None = None
        if root is not None:
            self.folder = Path(root) / hashlib.sha256(namespace.encode()).hexdigest()[:32]
        self._memory: dict[str, torch.Tensor] = {}
        self._shards: dict[str, list[Path]] = {}
        self._read: set[Path] = set()

    def get_or_compute(
        self,
        keys: Sequence[str],
        compute: Callable[[list[int]], np.ndarray | torch.Tensor],
        batch_size: int,
    ) -> torch.Tensor:
        """The values of `keys`, stacked in their order as (len(keys), …) on the CPU.

        Args:
            keys: one string an item (a picture's hash, a caption); repeated keys are computed once.
            compute: called with indices into `keys` of missing items, at most `batch_size` of
                them; returns their values stacked in that order.
            batch_size: positive.

        Raises:
            InputError: the cache folder cannot be written.
            ValueError: no keys, or `compute` returned another number of values than it was asked for.
        """
        import torch

        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        if not keys:
            raise ValueError("no keys: the shape of the values is not known")
        names = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
        self._fetch(set(names))
        first: dict[str, int] = {}
        for index, name in enumerate(names):
            if name not in self._memory:
                first.setdefault(name, index)
        missing = list(first.values())
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            values = torch.as_tensor(compute(list(batch))).detach().cpu()
            if len(values) != len(batch):
                raise ValueError(f"compute gave {len(values)} values for {len(batch)} items")
            # Clones, so that an entry does not keep its whole batch alive.
            entries = {names[i]: value.clone().contiguous() for i, value in zip(batch, values)}
            self._store(entries)
            self._memory.update(entries)
        return torch.stack([self._memory[name] for name in names])

    def __contains__(self, key: str) -> bool:
        name = hashlib.sha256(key.encode()).hexdigest()
        self._fetch({name})
        return name in self._memory

    def size(self) -> tuple[int, int]:
        """(entries, bytes on disk) of this namespace; entries in memory if there is no disk."""
        if self.folder is None:
            return len(self._memory), 0
        self._scan()
        return len(self._shards), sum(path.stat().st_size for path in self._files())

    def clear(self) -> None:
        """Forget this namespace, on disk too."""
        self._memory.clear()
        self._shards.clear()
        self._read.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.suffix == _SHARD_SUFFIX and not path.name.startswith(".")
        )

    def _scan(self) -> None:
        """Learn which shard holds what, from the headers of shards not seen yet."""
        for path in self._files():
            if path not in self._read:
                self._read.add(path)
                for name in _header_names(path):
                    self._shards.setdefault(name, []).append(path)

    def _fetch(self, names: set[str]) -> None:
        """Bring what is on disk of `names` into memory; an unreadable shard counts as absent."""
        wanted = names - self._memory.keys()
        if not wanted or self.folder is None:
            return
        self._scan()
        by_shard: dict[Path, list[str]] = {}
        for name in wanted:
            # An entry that was damaged and computed again lies in two shards.
            for path in self._shards.get(name, ()):
                by_shard.setdefault(path, []).append(name)
        for path, members in by_shard.items():
            self._memory.update(
                _read_entries(path, [name for name in members if name not in self._memory])
            )

    def _store(self, entries: dict[str, torch.Tensor]) -> None:
        if self.folder is None:
            return
        from safetensors.torch import save_file

        digest = hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()[:32]
        path = self.folder / f"{digest}{_SHARD_SUFFIX}"
        try:
            with atomic_path(path) as temporary:
                save_file({**entries, **_checksums(entries)}, temporary)
        except OSError as error:
            raise InputError(
                f"{self.folder}: the cache cannot be written ({error.strerror or error}); "
                "make room or set DIFFWARD_CACHE to another folder"
            ) from error
        self._read.add(path)
        for name in entries:
            shards = self._shards.setdefault(name, [])
            if path not in shards:
                shards.append(path)


_CHECKSUM = "sum:"


def _checksums(entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One checksum tensor an entry: safetensors itself does not notice flipped bits."""
    import torch

    return {
        _CHECKSUM + name: torch.tensor(list(_digest(value)), dtype=torch.uint8)
        for name, value in entries.items()
    }


def _digest(value: torch.Tensor) -> bytes:
    import torch

    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).digest()[:16]


def _header_names(path: Path) -> list[str]:
    """Keys of a shard from its header alone; none if it is damaged."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                return []
            header = json.loads(file.read(length))
        return [key for key in header if not key.startswith((_CHECKSUM, "__"))]
    except (OSError, struct.error, ValueError, TypeError):
        return []


def _read_entries(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Those of `names` that are whole in the shard."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                value = file.get_tensor(name).clone()  # not a view of the file
                if bytes(file.get_tensor(_CHECKSUM + name).tolist()) == _digest(value):
                    found[name] = value
    except Exception:  # safetensors raises its own classes; whatever it is, compute again
        return found
    return found
