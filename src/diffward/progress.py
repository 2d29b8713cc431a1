"""One progress line with an ETA: live on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY_SECONDS = 15.0


class Progress:
    """Counts steps of a known total; `advance(text)` after each."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done = label, total, done
        self._first, self._began, self._told = done, time.monotonic(), time.monotonic()
        self._live = sys.stderr.isatty()

    def advance(self, text: str = "", by: int = 1) -> None:
        self.done += by
        now = time.monotonic()
        wait = 0.1 if self._live else _EVERY_SECONDS
        if now - self._told >= wait or (self._live and self.done >= self.total):
            self._told = now
            self._tell(text)

    def _tell(self, text: str) -> None:
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, self.done - self._first) * (self.total - self.done)
        line = f"{self.label} {self.done}/{self.total}, {_clock(left)} left" + (
            f", {text}" if text else ""
        )
        if self._live:
            sys.stderr.write("\r\x1b[K" + line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._live and self.done > self._first:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Progress]:
    bar = Progress(label, total, done)
    try:
        yield bar
    finally:
        bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
