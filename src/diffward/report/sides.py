"""Members and non-members of an audit, from folders or from a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffward.data import Manifest, Pictures, load_pictures, manifest_from_folders, select
from diffward.errors import InputError


@dataclass(frozen=True)
class Sides:
    """Members and non-members of an audit, and what was noticed when they were put together."""

    members: Pictures
    non_members: Pictures
    notes: list[str] = field(default_factory=list)
    seed: int | None = None
    coin: bool = False  # each picture was put in or out by an independent fair coin

    @property
    def everyone(self) -> Pictures:
        return Pictures([*self.members, *self.non_members])

    @property
    def is_member(self) -> np.ndarray:
        return np.arange(len(self.members) + len(self.non_members)) < len(self.members)


def sides_of_folders(members: Pictures, non_members: Pictures) -> Sides:
    """Two folders as they are, minus non-members that are near-duplicates of members.

    Raises:
        InputError: a picture is in both folders, or a side is too small to say anything.
    """
    manifest = manifest_from_folders(members, non_members)
    copies = {b for _, b in manifest.crossing}
    kept = [h for h in dict.fromkeys(non_members.hashes) if h not in copies]
    notes = []
    if copies:
        notes.append(
            f"{len(copies)} non-members look like members (near-duplicates or mirror images) and were left out"
        )
    sides = Sides(
        members.with_hashes(dict.fromkeys(members.hashes)), non_members.with_hashes(kept), notes
    )
    return _checked(sides)


def sides_of_split(pictures: Pictures, manifest: Manifest) -> Sides:
    members, non_members = select(pictures, manifest)
    notes = []
    if seen := set(manifest.auxiliary):
        members = members.with_hashes([h for h in members.hashes if h not in seen])
        non_members = non_members.with_hashes([h for h in non_members.hashes if h not in seen])
        notes.append(
            f"{len(seen)} pictures that the training itself compared are left out: they prove nothing"
        )
    return _checked(Sides(members, non_members, notes, manifest.seed, manifest.is_coin))


def _checked(sides: Sides) -> Sides:
    for name, side in (("members", sides.members), ("non-members", sides.non_members)):
        if len(side) < 2:
            raise InputError(
                f"{len(side)} {name}: at least 2 pictures a side are needed, a few dozen to say much"
            )
    return sides


def load_sides(
    members: str | None,
    non_members: str | None,
    data: str | None,
    split: str | None,
    **columns: Any,
) -> tuple[Sides | None, list[str]]:
    """The two sides from the command line's paths; None where no pictures are given.

    Returns the sides and lines that say what was detected.
    """
    if members and non_members and not (data or split):
        inside, outside = load_pictures(members, **columns), load_pictures(non_members, **columns)
        sides = sides_of_folders(inside, outside)
        told = [f"members: {line}" for line in inside.told()]
        told += [f"non-members: {line}" for line in outside.told()]
        return sides, [*told, *sides.notes]
    if data and split and not (members or non_members):
        pictures = load_pictures(data, **columns)
        told = [f"pictures: {line}" for line in pictures.told()]
        sides = sides_of_split(pictures, Manifest.load(split))
        return sides, [*told, *sides.notes]
    if members or non_members or data or split:
        raise InputError("give --members and --non-members, or --data and --split, or none of them")
    return None, []
