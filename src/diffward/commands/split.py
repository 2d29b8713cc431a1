from __future__ import annotations


def split(
    data: str,
    out: str = "split.json",
    members: int | None = None,
    non_members: int | None = None,
    member_share: float = 0.5,
    canaries: bool = False,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    limit: int | None = None,
) -> None:
    """Divide pictures at random into members and non-members, near-duplicates on one side.

    Train on the members (`diffward train --split`), audit with both: only a random split of one
    source makes an honest audit.

    Args:
        data: folder of pictures, or a hub dataset id.
        out: the manifest to write (hashes of files, no names).
        members: how many pictures to train on.
        non_members: how many to hold out.
        member_share: share of members, where no number is given.
        canaries: flip a fair coin for each picture instead, for a lower bound on epsilon
            (`diffward audit --canaries`); of near-duplicates only one is used.
        limit: use only so many of the pictures.
    """
    from diffward.data import load_pictures, random_split
    from diffward.data.split import coin_split
    from diffward.errors import InputError

    if seed < 0:
        raise InputError(f"--seed {seed}: must not be negative")
    if canaries and (members is not None or non_members is not None or member_share != 0.5):
        raise InputError(
            "--canaries: a fair coin decides each picture, so that the sides have no size to ask "
            "for; leave out --members, --non-members and --member-share"
        )

    pictures = load_pictures(
        data, image_column=image_column, caption_column=caption_column, limit=limit
    )
    print("\n".join(f"pictures: {line}" for line in pictures.told()))
    if canaries:
        manifest = coin_split(pictures, seed=seed)
    else:
        manifest = random_split(
            pictures, n_members=members, n_non_members=non_members, member_share=member_share,
            seed=seed,
        )  # fmt: skip
    manifest.save(out)
    print(f"wrote {out}: {len(manifest.members)} members, {len(manifest.non_members)} non-members")
    if canaries and (left := manifest.groups["left_out"]):
        print(f"left out: {left} near-duplicates of others, which would be no independent coins")
