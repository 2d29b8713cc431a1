"""Several processes that learn one mask, as `accelerate launch` starts them; each of these does nothing for one alone."""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist


def several() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> tuple[int, int]:
    """How many there are, and which of them this is."""
    return (dist.get_world_size(), dist.get_rank()) if several() else (1, 0)


def average(gradient: Tensor) -> None:
    """In place, over all: they share one user and one mask."""
    if several():
        dist.all_reduce(gradient)
        gradient.div_(dist.get_world_size())


def shared(values: tuple[float, ...]) -> tuple[float, ...]:
    """The first process's: kernels need not round alike on all devices."""
    if not several():
        return values
    given = [values]
    dist.broadcast_object_list(given)
    return given[0]


def together() -> None:
    """Wait for the others."""
    if several():
        dist.barrier()
