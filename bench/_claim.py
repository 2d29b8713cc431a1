"""Work that several processes share: who has what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def claimed(what: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process has `what` to itself within the block: `what`.claim holds its pid.

    The claim is a lock on the file, so that one of a process that died is void at once.
    """
    import fcntl

    what.parent.mkdir(parents=True, exist_ok=True)
    with what.with_name(f"{what.name}.claim").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield True
