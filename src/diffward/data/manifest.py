"""Who is a member and who is not: splits by the hashes of the picture files.

A manifest is a membership oracle: keep it with the run, never inside a model file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from diffward.data.pictures import Pictures
from diffward.errors import InputError
from diffward.files import write_json

SCHEMA = "diffward.split/1"
Kind = Literal["half", "coin"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_HEX = frozenset("0123456789abcdef")


@dataclass
class Manifest:
    """A split of pictures.

    Attributes:
        members, non_members: sha256 of the picture files, each once.
        seed: of the random split; None where the user divided the pictures.
        groups: what the search for near-duplicates found, as counts.
        source: what the pictures were, without paths and names.
        crossing: (member, non-member) pairs of near-duplicates; empty in a random split.
        auxiliary: those of either side that the training compared (a proxy attacker, a gauge): an
            audit must not judge by them.
        kind: "coin" if an independent fair coin decided each picture, which a lower bound on
            epsilon needs; "half" for every other split, also into unequal parts or by the user.
    """

    members: list[str]
    non_members: list[str]
    seed: int | None = None
    groups: dict[str, int] = field(default_factory=dict)
    source: str = ""
    crossing: list[tuple[str, str]] = field(default_factory=list)
    kind: Kind = "half"
    auxiliary: list[str] = field(default_factory=list)

    @property
    def is_coin(self) -> bool:
        """Whether each picture was put in or out by an independent fair coin."""
        return self.kind == "coin"

    def check(self, pictures: Pictures | None = None) -> None:
        """
        Raises:
            InputError: a picture is on both sides (named, where `pictures` knows it), a side is
                empty, or the kind is not known.
        """
        if self.kind not in KINDS:
            raise InputError(f"the split is of kind {self.kind!r}, not {' or '.join(KINDS)}")
        both = [digest for digest in self.members if digest in set(self.non_members)]
        if both:
            names = {picture.sha256: picture.name for picture in pictures or ()}
            raise InputError(
                f"{len(both)} pictures are members and non-members at once: "
                f"{_some([names.get(digest, digest[:12] + '…') for digest in both])}; "
                "take them out of one side"
            )
        for side, hashes in (("members", self.members), ("non-members", self.non_members)):
            if not hashes:
                raise InputError(f"the split has no {side}; both sides need at least one picture")
        if not set(self.auxiliary) <= {*self.members, *self.non_members}:
            raise InputError(
                "the split's auxiliary pictures are on neither side; make the split again"
            )

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(
            path,
            {
                "schema": SCHEMA,
                "source": self.source,
                "seed": self.seed,
                "kind": self.kind,
                "groups": self.groups,
                "members": self.members,
                "non_members": self.non_members,
                "crossing": [list(pair) for pair in self.crossing],
                **({"auxiliary": self.auxiliary} if self.auxiliary else {}),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """
        Raises:
            InputError: not there, not a split manifest, or a split that `check` refuses.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: the split cannot be read ({error.strerror})") from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}: is not a JSON file; give a saved split") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise InputError(
                f"{path}: is not a split manifest (schema {schema!r}, expected {SCHEMA!r}); "
                "give the file that the split was saved to"
            )
        seed, groups = data.get("seed"), data.get("groups")
        manifest = cls(
            members=_hashes(path, data, "members"),
            non_members=_hashes(path, data, "non_members"),
            seed=seed if isinstance(seed, int) else None,
            groups=groups if isinstance(groups, dict) else {},
            source=str(data.get("source", "")),
            crossing=[(str(a), str(b)) for a, b in _pairs(data.get("crossing"))],
            kind=data.get("kind", "half"),  # `check` refuses others; early manifests have none
            auxiliary=_hashes(path, data, "auxiliary") if "auxiliary" in data else [],
        )
        try:
            manifest.check()
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return manifest


def manifest_from_folders(
    members: Pictures, non_members: Pictures, *, poses: bool = True
) -> Manifest:
    """The split that a user brings as two folders.

    Near-duplicates across the two are reported in `.crossing`, for the audit to warn of or drop:
    they blur the boundary that is measured. `poses` as in `near_duplicate_groups`.

    Raises:
        InputError: a picture is in both folders, byte for byte; it is named.
    """
    from diffward.data.duplicates import near_duplicate_pairs

    here = {picture.sha256: picture.name for picture in members}
    both = [f"{here[p.sha256]} = {p.name}" for p in non_members if p.sha256 in here]
    if both:
        raise InputError(
            f"{len(both)} pictures are members and non-members at once: {_some(both)}; "
            "take them out of one folder"
        )
    everyone = [*members, *non_members]
    crossing = {
        (everyone[a].sha256, everyone[b].sha256)
        for a, b in near_duplicate_pairs(everyone, poses=poses)
        if a < len(members) <= b
    }
    manifest = Manifest(
        members=sorted(set(members.hashes)),
        non_members=sorted(set(non_members.hashes)),
        groups={"pictures": len(everyone), "crossing_pairs": len(crossing)},
        source=f"members: {members.layout}; non-members: {non_members.layout}",
        crossing=sorted(crossing),
    )
    manifest.check()
    return manifest


def select(pictures: Pictures, manifest: Manifest) -> tuple[Pictures, Pictures]:
    """(members, non-members) of `pictures`, in the manifest's order, each file content once.

    Raises:
        InputError: pictures of the manifest are missing, or it contradicts itself.
    """
    manifest.check(pictures)
    return pictures.with_hashes(manifest.members), pictures.with_hashes(manifest.non_members)


def _hashes(path: str | Path, data: dict[str, Any], key: str) -> list[str]:
    values = data.get(key)
    good = isinstance(values, list) and all(
        isinstance(v, str) and len(v) == 64 and _HEX.issuperset(v) for v in values
    )
    if not good or len(set(values)) != len(values):  # type: ignore[arg-type]
        raise InputError(
            f"{path}: '{key}' is not a list of distinct sha256 sums; make the split again"
        )
    return values  # type: ignore[return-value]


def _pairs(value: Any) -> list[Sequence[Any]]:
    if not isinstance(value, list):
        return []
    return [pair for pair in value if isinstance(pair, list) and len(pair) == 2]


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
