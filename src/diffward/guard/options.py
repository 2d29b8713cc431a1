"""Which settings a guard reads: an artefact tells of no other, and one that would steer it elsewhere is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from diffward.errors import InputError
from diffward.guard.settings import GuardSettings
from diffward.guard.subject import GUARDS, TUNING

ALWAYS = frozenset({"seed"})
# How much work is done and how: may stand in a file of settings for several guards.
EFFORT = TUNING | {"updates", "interval", "checkpoint_every"}


def reads(method: str, settings: GuardSettings) -> frozenset[str]:
    """Names of the settings, and of the words, that a run of the guard looks at."""
    extra = GUARDS[method].extra
    published = extra["not_published"] if settings.paper and "not_published" in extra else ()
    return (extra["options"] | ALWAYS) - frozenset(published)


def settings_read(method: str, settings: GuardSettings) -> dict[str, Any]:
    """Those settings, for an artefact."""
    read = reads(method, settings)
    return {name: value for name, value in asdict(settings).items() if name in read}


def check_options(
    method: str, settings: GuardSettings, concepts: Sequence[str] = (), guide: str = ""
) -> None:
    """Refuse what would steer another guard and this one does not look at; effort may be given to any.

    Raises:
        InputError: names the option, and the guards that it is for.
    """
    read, usual = reads(method, settings), asdict(GuardSettings())
    given = {**asdict(settings), "concepts": list(concepts), "guide": guide}
    usual |= {"concepts": [], "guide": ""}
    for name, value in given.items():
        if name in read | EFFORT or value == usual[name]:
            continue
        option, shown = name.replace("_", "-"), value
        if isinstance(value, dict):  # a group, as --uce.pairing
            part = next(key for key in value if value[key] != usual[name][key])
            option, shown = f"{name}.{part.replace('_', '-')}", value[part]
        able = [e.name for e in GUARDS if name in e.extra["options"]]
        hint = "drop --paper" if method in able else f"use {' or '.join(able)}"
        raise InputError(
            f"--{option} {shown}: guard {method} does not look at it; leave it out, or {hint}"
        )
