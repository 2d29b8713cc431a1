"""Training an attacker's own small network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[torch.device]:
    """Within the block torch draws from `seed` and learns, outside nothing of it shows. Yields where to train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=states), torch.enable_grad():
        torch.manual_seed(seed)
        yield device
