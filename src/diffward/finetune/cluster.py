"""Work in tasks of a Ray cluster: the one that is running (`RAY_ADDRESS`), or one started here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from diffward.errors import DiffwardError, InputError

T = TypeVar("T")
_PATIENCE = 60.0  # seconds for stopped tasks to save their checkpoints


def on_ray(
    function: Callable[..., T], shared: Sequence[Any], parts: Sequence[Any], gpu: bool
) -> Iterator[T]:
    """`function(*shared, part)` of each part as a task; gives the answers as they come.

    `shared` travels once, as it is and not by name: it need not lie on the other machines. If one fails or the
    caller stops, the others are told to stop, and given a minute to save.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "--cluster ray: Ray is not installed (pip install diffward[cluster])"
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    ray.init(ignore_reinit_error=True)
    there = [ray.put(one) for one in shared]
    task = ray.remote(num_gpus=int(gpu))(function)
    waiting = [task.remote(*there, part) for part in parts]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except BaseException as error:
        for reference in waiting:
            ray.cancel(reference)  # as Ctrl-C would
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=_PATIENCE)
        cause = getattr(error, "cause", None)  # Ray puts its traceback in place of our one line
        if isinstance(cause, DiffwardError):
            raise cause from None
        raise
