"""Errors that a user can act on. The CLI prints them as one line and exits with `exit_code`."""

from __future__ import annotations


class DiffwardError(Exception):
    """Base of all errors that are reported as one clear line instead of a traceback."""

    exit_code = 2


class InputError(DiffwardError):
    """The input or the command line is wrong. The message says what, where and what to do."""

    exit_code = 2


class TrainingError(DiffwardError):
    """A run broke one of its invariants (NaN loss, adapter that does not move)."""

    exit_code = 2
