"""Which pictures a training may compare, and which it must leave to the audit.

Of the held-out pictures and of the members a part is auxiliary: a proxy attacker learns from one half of
it, the gauge reads the other. No audit judges by auxiliary pictures, so that it stays honest.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from diffward.data import Manifest, Pictures, random_split
from diffward.errors import InputError
from diffward.finetune.method import Auxiliary
from diffward.models.features import encode_pictures

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

LEAST = 4  # pictures a side for the proxy attacker, and as many for the gauge
SHARE = 0.25  # of the pictures, held out where a method needs some and none were named


def mark_auxiliary(
    pictures: Pictures, manifest: Manifest, share: float, seed: int, *, held_out: bool = True
) -> Manifest:
    """`manifest` with `share` of each side marked as auxiliary, near-duplicates together.

    Args:
        held_out: take some of the non-members too; not needed where pictures from elsewhere serve.

    Raises:
        InputError: too few pictures; it says how many are needed.
    """
    found = _part(pictures, manifest.members, share, seed, "pictures to train on")
    if held_out:
        found += _part(pictures, manifest.non_members, share, seed, "held-out pictures")
    return replace(manifest, auxiliary=sorted(found))


def build_auxiliary(
    denoiser: Denoiser,
    pictures: Pictures,
    manifest: Manifest,
    training: Pictures,
    *,
    others: Pictures | None = None,
    seed: int = 0,
    cache: bool = True,
) -> Auxiliary:
    """What a private method works with.

    Args:
        pictures: those of `manifest`.
        training: the pictures that train, in the order of their features.
        others: a hold-out folder or look-alikes, in place of the manifest's auxiliary non-members.

    Raises:
        InputError: too few of them, or `others` are not other pictures.
    """
    marked = set(manifest.auxiliary)
    members = [digest for digest in manifest.members if digest in marked]
    if others is None:
        held = [digest for digest in manifest.non_members if digest in marked]
        source = pictures
    else:
        source, held = others, list(dict.fromkeys(others.hashes))
        if both := {*manifest.members, *manifest.non_members} & set(held):
            raise InputError(
                f"--holdout-data holds {len(both)} pictures of the split, which train or are the audit's; "
                "take them out of one of the two"
            )
    _need(len(held), "held-out pictures")
    row = {digest: number for number, digest in enumerate(training.hashes)}
    proxy, gauge = _divided(pictures, members, 0.5, seed)
    outside, validation = (
        encode_pictures(denoiser, source.with_hashes(side), cache=cache)
        for side in _divided(source, held, 0.5, seed)
    )
    known, seen = (torch.tensor([row[digest] for digest in side]) for side in (proxy, gauge))
    return Auxiliary(known, outside, seen, validation)


def _part(pictures: Pictures, side: list[str], share: float, seed: int, what: str) -> list[str]:
    _need(math.floor(len(side) * share), what, math.ceil(2 * LEAST / share))
    return _divided(pictures, side, share, seed)[0]


def _divided(
    pictures: Pictures, side: list[str], share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Near-duplicates stay together; pictures of one subject in many poses only as far as that works."""
    for poses in (True, False):
        try:
            split = random_split(
                pictures.with_hashes(side), member_share=share, seed=seed, poses=poses
            )
        except InputError:
            if not poses:
                raise
            continue
        if abs(len(split.members) - share * len(side)) <= max(1, 0.1 * len(side)):
            break
    return split.members, split.non_members


def _need(count: int, what: str, least: int = 2 * LEAST) -> None:
    if count < 2 * LEAST:
        raise InputError(
            f"a private method compares members with pictures that do not train: at least {least} {what} are "
            "needed; give more pictures, a larger --holdout or --auxiliary, or others with --holdout-data"
        )
