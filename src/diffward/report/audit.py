"""The audit: one LoRA file, the base it was made for, and pictures, to the report's figures."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.data import Manifest, Pictures, load_pictures, manifest_from_folders, select
from diffward.errors import InputError
from diffward.lora import inspect_lora, open_lora
from diffward.provenance import hardware, versions
from diffward.report.build import PerImage, build_report

if TYPE_CHECKING:
    from diffward.membership.statistics import ChanceCheck
    from diffward.models.denoiser import Denoiser

MOST_BLIND_SIZE = 128  # the blind control looks at pictures no larger than this


@dataclass(frozen=True)
class Sides:
    """Members and non-members of an audit, and what was noticed when they were put together."""

    members: Pictures
    non_members: Pictures
    notes: list[str] = field(default_factory=list)
    seed: int | None = None

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
    return _checked(Sides(members, non_members, seed=manifest.seed))


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
        return sides_of_split(pictures, Manifest.load(split)), told
    if members or non_members or data or split:
        raise InputError("give --members and --non-members, or --data and --split, or none of them")
    return None, []


def audit_lora(
    denoiser: Denoiser | None,
    file: str | Path,
    sides: Sides | None,
    *,
    pairs: int = 16,
    batch: int | None = None,
    seed: int = 0,
    cache: bool = True,
    thumbnails: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], PerImage | None]:
    """Audit one file. Without `sides` only the file itself is looked at and no base is needed.

    Returns:
        The report (see `report.schema`) and the scores of the pictures, for `write_report`.

    Raises:
        InputError: the file is broken, is not a LoRA, or is for another base.
    """
    began = time.monotonic()
    inspection = inspect_lora(file)
    subject = {**inspection.to_dict(), "sha256": inspection.sha256 or open_lora(file).sha256}
    leaks = [leak.to_dict() for leak in inspection.leaks]
    attacks, per_image = None, None
    if sides is not None:
        assert denoiser is not None
        attacks, per_image = _membership(denoiser, file, sides, pairs, batch, seed, cache)
        if thumbnails:
            per_image["thumbnails"] = [thumbnail(p.load(64)) for p in sides.everyone]
    provenance = {
        **versions(),
        "device": hardware(str(denoiser.device) if denoiser else "none"),
        "seeds": {"pairs": seed, "split": sides.seed if sides else None},
        "wall_seconds": round(time.monotonic() - began, 2),
        "notes": sides.notes if sides else [],
        "config": config or {},
    }
    return build_report(subject, leaks, attacks, provenance), per_image


def _membership(
    denoiser: Denoiser,
    file: str | Path,
    sides: Sides,
    pairs: int,
    batch: int | None,
    seed: int,
    cache: bool,
) -> tuple[dict[str, dict[str, Any]], PerImage]:
    from diffward.membership.bank import Pairs, build_bank
    from diffward.membership.evaluate import run_attacks
    from diffward.models.features import encode_pictures

    opened = open_lora(file)
    denoiser.attach(opened.load())
    pictures = sides.everyone
    features = encode_pictures(denoiser, pictures, cache=cache)
    drawn = Pairs.draw(denoiser, pairs, seed)
    bank = build_bank(
        denoiser,
        features,
        pictures.hashes,
        drawn,
        adapter_id=opened.sha256 if cache else None,
        batch=batch,
    )
    figures, scores = run_attacks(
        bank,
        sides.is_member,
        blind_check(pictures, sides.is_member, denoiser.resolution, seed),
        seed=seed,
    )
    per_image: PerImage = {
        "file": [p.name or p.path.name for p in pictures],
        "sha256": pictures.hashes,
        "member": sides.is_member.tolist(),
        "scores": {name: s.tolist() for name, s in scores.items()},
    }
    return figures, per_image


def blind_check(
    pictures: Pictures, is_member: np.ndarray, resolution: int, seed: int
) -> ChanceCheck | None:
    """The blind control: do the two sides differ by themselves? None where a side is one scene."""
    from diffward.data import near_duplicate_groups
    from diffward.membership.blind import blind_control, blind_features, file_stats

    pixels = pictures.pixels(min(MOST_BLIND_SIZE, resolution))
    features = blind_features(pixels, pictures.captions, [file_stats(p.path) for p in pictures])
    groups = np.zeros(len(pictures), dtype=int)
    for number, group in enumerate(near_duplicate_groups(pictures)):
        groups[group] = number
    if min(len(set(groups[is_member])), len(set(groups[~is_member]))) < 2:
        return None
    return blind_control(features, is_member, seed, groups)[1]


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
