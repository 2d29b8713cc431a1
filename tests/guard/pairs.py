"""A job done by one process, and by two that share it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def alone_and_shared(job: Callable[[int, Path, int], None], folder: Path) -> tuple[Any, Any, Any]:
    """What `job(rank, folder, port)` saved as `{port > 0}-{rank}.pt`: alone (port 0), and each of two."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job(0, folder, 0)
    mp.spawn(job, (folder, port), nprocs=2)
    alone, first, second = (
        torch.load(folder / f"{name}.pt") for name in ("False-0", "True-0", "True-1")
    )
    return alone, first, second
