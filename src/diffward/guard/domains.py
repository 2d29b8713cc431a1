"""The forbidden and the allowed domain: folders of pictures, and what may be said of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffward.data import Pictures, load_pictures, near_duplicate_pairs
from diffward.errors import InputError
from diffward.guard.subject import GUARDS


@dataclass
class Domains:
    """The pictures of both domains, and the words that an artefact may have for them."""

    illegal: Pictures
    innocent: Pictures
    illegal_name: str = "illegal"
    innocent_name: str = "innocent"

    @classmethod
    def load(
        cls, method: str, illegal: str, innocent: str, names: tuple[str, str], **columns: Any
    ) -> Domains:
        """List both; each may be several folders with commas between.

        Raises:
            InputError: a domain that the method needs is empty, or the two share pictures.
        """
        needed = GUARDS[method].extra["domains"]  # uce edits words, random draws lots
        found = cls(
            load_domain("illegal", illegal, "illegal" in needed, columns),
            load_domain("innocent", innocent, "innocent" in needed, columns),
            *names,
        )
        found.check()
        return found

    def check(self, which: str = "") -> None:
        """Raises `InputError` where a picture, or a copy of it, is in both: the mask could not tell them apart."""
        if both := in_both(self.illegal, self.innocent):
            raise InputError(
                f"--illegal and --innocent{which} share {len(both)} pictures (copies, or nearly); take them out of one of "
                "the two"
            )

    def facts(self) -> dict[str, dict[str, Any]]:
        """Words and numbers; no file names, no captions."""
        return {
            "illegal": {"name": self.illegal_name, "pictures": len(self.illegal)},
            "innocent": {"name": self.innocent_name, "pictures": len(self.innocent)},
        }

    def digest(self) -> dict[str, str]:
        """Hashes of pictures and captions, to know a run by; they stay in its work folder."""
        return {
            name: hashlib.sha256(
                json.dumps([[p.sha256, p.caption] for p in pictures]).encode()
            ).hexdigest()
            for name, pictures in (("illegal", self.illegal), ("innocent", self.innocent))
        }


def in_both(first: Pictures, second: Pictures) -> set[int]:
    """Rows of `first` that are in `second` too, copies and near-duplicates included."""
    count, others = len(first), set(second.hashes)
    pairs = near_duplicate_pairs([*first, *second], poses=False)
    same = {row for row, one in enumerate(first.hashes) if one in others}
    return {a for a, b in pairs if a < count <= b} | same


def load_folders(
    option: str, given: str, needed: bool, columns: dict[str, Any]
) -> list[tuple[str, Pictures]]:
    """Each of the folders with commas between: its last name, and its pictures.

    Raises:
        InputError: one is missing, or none is given and one is needed.
    """
    folders = [given] if Path(given).exists() else given.split(",")
    folders = [folder.strip() for folder in folders if folder.strip()]
    if not folders and needed:
        raise InputError(f"--{option} is missing: name a folder of pictures")
    return [(Path(folder).name, load_pictures(folder, **columns)) for folder in folders]


def load_domain(option: str, given: str, needed: bool, columns: dict[str, Any]) -> Pictures:
    """The pictures of all of them; of several, names begin with the folder's."""
    parts = load_folders(option, given, needed, columns)
    if len(parts) == 1:
        return parts[0][1]
    return Pictures(
        [replace(p, name=f"{name}/{p.name}") for name, part in parts for p in part],
        "; ".join(part.layout for _, part in parts),
        [(f"{name}/{path}", why) for name, part in parts for path, why in part.skipped],
        [note for _, part in parts for note in part.notes],
    )  # fmt: skip
