"""Whose pictures LoRAs are trained on: the drawn world's people, or folders of pictures of one subject each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from diffward.errors import InputError

WORLD = "world"
TRAINING = 1  # first number of the seeds of pictures that LoRAs are trained on
_KINDS = {"": "portrait", "logo": "logo", "garment": "garment"}


@dataclass(frozen=True)
class Portrait:
    """A picture, uint8 (side, side, 3), and a caption of its own that calls the subject {name}; empty if it has none."""

    pixels: np.ndarray
    caption: str


class Subjects(Protocol):
    """Subjects by number; what is drawn depends on the numbers alone.

    Attributes:
        name: what it is called on the command line.
        digest: of what they are: a folder may change.
        attributes: what is known of every subject: attribute name -> its values; empty where nothing is.
    """

    name: str
    digest: str
    attributes: dict[str, list[str]]

    def __len__(self) -> int: ...

    def label(self, number: int) -> tuple[int, ...]:
        """The index of each attribute's value; empty where there are none."""
        ...

    def pictures(self, number: int, count: int, seed: Sequence[int]) -> list[Portrait]:
        """At most `count` pictures of a subject, other ones with another seed."""
        ...


class World:
    """Fictional people of the embedded base's world (or its logos, its garments), as many as one asks for."""

    def __init__(self, kind: str = "", seed: int = 0) -> None:
        from diffward.models.mini.attributes import DOMAINS, IDENTITY

        if kind not in _KINDS:
            raise InputError(
                f"--subjects {WORLD}:{kind}: choose {WORLD}, {WORLD}:logo or {WORLD}:garment"
            )
        self.name = f"{WORLD}:{kind}" if kind else WORLD
        self.domain, self.seed, self.digest = _KINDS[kind], seed, ""
        self.attributes = dict(IDENTITY if self.domain == "portrait" else DOMAINS[self.domain])

    def __len__(self) -> int:
        return 10**9

    def label(self, number: int) -> tuple[int, ...]:
        rng = np.random.default_rng([self.seed, 31, number])
        return tuple(int(rng.integers(len(values))) for values in self.attributes.values())

    def pictures(self, number: int, count: int, seed: Sequence[int]) -> list[Portrait]:
        from diffward.models.mini import world
        from diffward.models.mini.attributes import Person, caption

        label, drawn_from = self.label(number), [self.seed, 32, number, *seed]
        if self.domain == "portrait":
            drawings = world.portraits(Person(label), count, drawn_from, name="{name}", mention=0.5)
            return [Portrait(d.pixels, d.caption) for d in drawings]
        rng = np.random.default_rng(drawn_from)
        values = dict(zip(self.attributes, label, strict=True))
        return [
            Portrait(
                world.draw(self.domain, values, rng), caption(self.domain, values, rng, mention=0.5)
            )
            for _ in range(count)
        ]


class Folders:
    """Subfolders of a folder, one a subject, each in any layout that `diffward train` reads."""

    def __init__(self, root: Path, side: int) -> None:
        from diffward.data import load_pictures

        found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(found) < 2:
            raise InputError(
                f"--subjects {root}: {len(found)} subfolders; one folder a subject is needed, at least 2"
            )
        self.name, self.side = str(root), side
        self.attributes: dict[str, list[str]] = {}
        self._subjects = [load_pictures(folder) for folder in found]
        for folder, own in zip(found, self._subjects, strict=True):
            if len(own) < 2:
                raise InputError(
                    f"{folder}: one picture; at least 2 a subject are needed, one to train on and one to know it by"
                )
        told = [
            (folder.name, own.hashes) for folder, own in zip(found, self._subjects, strict=True)
        ]
        self.digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._subjects)

    def label(self, number: int) -> tuple[int, ...]:
        return ()

    def pictures(self, number: int, count: int, seed: Sequence[int]) -> list[Portrait]:
        own = self._subjects[number]
        # One half, by hash, is for training LoRAs (seeds that begin with 1), the other for everything else.
        order = sorted(range(len(own)), key=lambda i: own[i].sha256)
        half = order[::2] if seed[0] == TRAINING else order[1::2]
        chosen = np.random.default_rng([number, *seed]).permutation(half)[:count]
        return [Portrait(own[i].load(self.side), own[i].caption) for i in chosen.tolist()]


def public_subjects(name: str) -> str:
    """What they may be called in a file that is passed on: not where they lay on this machine."""
    return name if name.split(":")[0] == WORLD else "a folder"


def open_subjects(name: str, *, seed: int, side: int) -> Subjects:
    """`world`, `world:logo`, `world:garment`, or a folder of folders.

    Args:
        side: pixels of the base that the pictures are for.

    Raises:
        InputError: there is no such thing, or the world's pictures do not fit the base.
    """
    if name == WORLD or name.startswith(f"{WORLD}:"):
        from diffward.models.mini.world import SIZE

        if side != SIZE:
            raise InputError(
                f"--subjects {name}: its pictures have {SIZE} pixels, the base works on {side}; give a folder of folders"
            )
        return World(name.removeprefix(WORLD).removeprefix(":"), seed)
    if not Path(name).is_dir():
        raise InputError(f"--subjects {name}: no such folder; give {WORLD} or a folder of folders")
    return Folders(Path(name), side)
