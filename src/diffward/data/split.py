"""The random splits: into parts of a size, near-duplicates on one side, or by coin flips."""

from __future__ import annotations

import numpy as np

from diffward.data.duplicates import near_duplicate_groups
from diffward.data.manifest import Manifest
from diffward.data.pictures import Pictures
from diffward.errors import InputError


def random_split(
    pictures: Pictures,
    *,
    n_members: int | None = None,
    n_non_members: int | None = None,
    member_share: float = 0.5,
    seed: int = 0,
    poses: bool = True,
) -> Manifest:
    """Divide `pictures` at random into members and non-members.

    Groups of near-duplicates never cross. Sizes that are asked for are met exactly, if need be by
    leaving a part of a group out of both sides; without sizes `member_share` of the pictures are
    members, as nearly as the groups allow. The same pictures and seed give the same split whatever
    their order and file names; copies of a file count once.

    Args:
        n_members: how many members; all others are non-members unless their number is given too.
        n_non_members: how many non-members; all others are members unless theirs is given.
        member_share: between 0 and 1, where neither number is given.
        poses: as in `near_duplicate_groups`.

    Raises:
        InputError: fewer than two pictures that differ, or not enough for the sizes.
    """
    for name, value in (("n_members", n_members), ("n_non_members", n_non_members)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: both sides need at least one picture")
    if not 0 < member_share < 1:
        raise InputError(f"member_share {member_share}: give a share between 0 and 1")
    groups, total = _groups(pictures, poses)
    _check_groups(groups, total)
    rng = np.random.default_rng(seed)
    shuffled = [
        [groups[g][i] for i in rng.permutation(len(groups[g]))]
        for g in rng.permutation(len(groups))
    ]
    if n_members is None and n_non_members is None:
        sides = _by_share(shuffled, member_share * total)
    else:
        sides = _by_number(shuffled, n_members, n_non_members, total)
    manifest = Manifest(
        members=sides[0],
        non_members=sides[1],
        seed=seed,
        groups=_counts(pictures, groups, total, len(sides[0]) + len(sides[1])),
        source=pictures.layout,
    )
    manifest.check(pictures)
    return manifest


def coin_split(pictures: Pictures, *, seed: int = 0, poses: bool = True) -> Manifest:
    """A fair coin for each picture: heads is a member. The canaries of `membership.epsilon`.

    Near-duplicates are no independent canaries: of each group of them one picture drawn at random
    has a coin, the others are on no side (`groups["left_out"]`). The same pictures and seed give
    the same split whatever their order and file names. `poses` as in `near_duplicate_groups`.

    Raises:
        InputError: fewer than two pictures that differ, or so few that all coins fell alike.
    """
    groups, total = _groups(pictures, poses)
    _check_groups(groups, total)
    rng = np.random.default_rng(seed)
    canaries = [group[int(rng.integers(len(group)))] for group in groups]
    heads = rng.integers(0, 2, len(canaries)).astype(bool)
    if heads.all() or not heads.any():
        raise InputError(
            f"all {len(canaries)} coins fell alike with seed {seed}: coins need more pictures that "
            "differ, hundreds to bound epsilon; add some"
        )
    manifest = Manifest(
        members=[digest for digest, head in zip(canaries, heads, strict=True) if head],
        non_members=[digest for digest, head in zip(canaries, heads, strict=True) if not head],
        seed=seed,
        groups=_counts(pictures, groups, total, len(canaries)),
        source=pictures.layout,
        kind="coin",
    )
    manifest.check(pictures)
    return manifest


def _check_groups(groups: list[list[str]], total: int) -> None:
    if len(groups) < 2:
        what = "one picture" if total == 1 else f"{total} pictures, all near-duplicates"
        raise InputError(
            f"{what}: a split needs pictures that differ on both sides; add other pictures"
        )


def _counts(pictures: Pictures, groups: list[list[str]], total: int, dealt: int) -> dict[str, int]:
    """A manifest's `groups`; `dealt` pictures are on one side or the other."""
    large = [len(group) for group in groups if len(group) > 1]
    return {
        "pictures": len(pictures),
        "exact_copies": len(pictures) - total,
        "near_duplicate_groups": len(large),
        "pictures_in_them": sum(large),
        "largest": max(large, default=1),
        "left_out": total - dealt,
    }


def _groups(pictures: Pictures, poses: bool) -> tuple[list[list[str]], int]:
    """Groups as sorted lists of distinct hashes, themselves sorted, and the number of hashes."""
    # In the order of hashes, so that the order on disk has no say anywhere.
    ordered = pictures.with_hashes(sorted(set(pictures.hashes)))
    found = near_duplicate_groups(ordered, poses=poses)
    return sorted(sorted(ordered[i].sha256 for i in group) for group in found), len(ordered)


def _by_share(groups: list[list[str]], target: float) -> tuple[list[str], list[str]]:
    """Whole groups to the members as long as that brings their number nearer to `target`."""
    members: list[str] = []
    others: list[str] = []
    for group in groups:
        side = members if len(members) + len(group) / 2 <= target else others
        side.extend(group)
    # With few groups one side may have got nothing; give it the smallest group of the other.
    for poor, rich in ((members, others), (others, members)):
        if not poor:
            smallest = min(groups, key=len)
            poor.extend(smallest)
            rich[:] = [digest for digest in rich if digest not in set(smallest)]
    return members, others


def _by_number(
    groups: list[list[str]], n_members: int | None, n_non_members: int | None, total: int
) -> tuple[list[str], list[str]]:
    """Exactly the numbers asked for; a side without a number takes all the rest."""
    if n_members is None:
        swapped = _by_number(groups, n_non_members, None, total)
        return swapped[1], swapped[0]
    members: list[str] = []
    rest: list[list[str]] = []
    for group in groups:
        if len(members) + len(group) <= n_members:
            members.extend(group)
        else:
            rest.append(group)
    if len(members) < n_members and rest:
        # No whole group fits any more: a part of the smallest one, its others on no side.
        part = min(rest, key=len)
        rest.remove(part)
        members.extend(part[: n_members - len(members)])
    others: list[str] = []
    left: list[list[str]] = []
    for group in rest:
        if n_non_members is None or len(others) + len(group) <= n_non_members:
            others.extend(group)
        else:
            left.append(group)
    if n_non_members is not None and len(others) < n_non_members and left:
        part = min(left, key=len)
        others.extend(part[: n_non_members - len(others)])
    if len(members) < n_members or len(others) < (n_non_members or 1):
        asked = f"{n_members} + {'the rest' if n_non_members is None else n_non_members}"
        raise InputError(
            f"a split into {asked} pictures is not possible: there are {total} that differ, and "
            f"near-duplicates must stay on one side ({len(groups)} groups); ask for fewer"
        )
    return members, others
