"""A picture on disk, known by the hash of its bytes, and an ordered set of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

from diffward.data.decode import UnreadableError, decode, to_square
from diffward.errors import InputError

#: Side of the thumbnail kept for the search for near-duplicates.
THUMBNAIL = 32


@dataclass(frozen=True)
class Picture:
    """One readable picture.

    Attributes:
        path: where its file lies.
        caption: the text that goes with it, "" if none.
        sha256: hash of the file's bytes, the picture's identity in manifests and caches.
        repeats: how often an epoch shows it (kohya's repeat folders), 1 elsewhere.
        name: its path relative to the folder that was loaded, with forward slashes.
        thumbnail: uint8 (32, 32, 3), the whole picture squeezed, for the duplicate search.
    """

    path: Path
    caption: str
    sha256: str
    repeats: int = 1
    name: str = ""
    thumbnail: np.ndarray | None = field(default=None, compare=False, repr=False)

    def load(self, size: int) -> np.ndarray:
        """Pixels as uint8 (size, size, 3): upright, RGB, shorter side resized with antialiasing,
        centre cropped, transparency on white.

        Raises:
            InputError: the file went away, changed since it was listed, or cannot be read.
        """
        if size < 1:
            raise InputError(f"picture size {size} is not positive; give a size such as 512")
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read any more ({error.strerror}); load the folder again"
            ) from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            # A silent change would poison every cache and manifest that knows it by its hash.
            raise InputError(f"{self.path}: changed since it was listed; load the folder again")
        try:
            return to_square(decode(data, at_least=2 * size), size)
        except UnreadableError as error:
            raise InputError(f"{self.path}: {error}; repair or remove it") from error


class Pictures(Sequence[Picture]):
    """Pictures in a stable order, with what was found out while loading them.

    Attributes:
        layout: one line on what was detected; names no folder or file, so it may be published.
        skipped: (relative path, reason) of everything that was left out.
        notes: further lines worth telling the user.
    """

    def __init__(
        self,
        pictures: Iterable[Picture],
        layout: str = "",
        skipped: Iterable[tuple[str, str]] = (),
        notes: Iterable[str] = (),
    ) -> None:
        self._pictures = tuple(pictures)
        self.layout = layout
        self.skipped = list(skipped)
        self.notes = list(notes)

    def __len__(self) -> int:
        return len(self._pictures)

    def __iter__(self) -> Iterator[Picture]:
        return iter(self._pictures)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Picture | Pictures:
        if isinstance(index, slice):
            return Pictures(self._pictures[index], self.layout, self.skipped, self.notes)
        return self._pictures[index]

    def __repr__(self) -> str:
        return f"Pictures({len(self)}, {self.layout!r}, skipped={len(self.skipped)})"

    def told(self) -> list[str]:
        """What to tell the user: the layout, remarks, and every file left out with the reason."""
        return [self.layout, *self.notes, *(f"skipped {path}: {why}" for path, why in self.skipped)]

    @property
    def captions(self) -> list[str]:
        return [picture.caption for picture in self]

    @property
    def hashes(self) -> list[str]:
        return [picture.sha256 for picture in self]

    def pixels(self, size: int) -> np.ndarray:
        """All pictures as uint8 (n, size, size, 3); see `Picture.load` for the errors."""
        batch = np.empty((len(self), size, size, 3), dtype=np.uint8)
        for row, picture in enumerate(self):
            batch[row] = picture.load(size)
        return batch

    def at(self, indices: Iterable[int]) -> Pictures:
        """The pictures at `indices`, in that order."""
        chosen = [self._pictures[index] for index in indices]
        return Pictures(chosen, self.layout, self.skipped, self.notes)

    def with_hashes(self, hashes: Iterable[str]) -> Pictures:
        """The pictures with these hashes, in the order of `hashes`; of files with the same bytes
        the first one only.

        Raises:
            InputError: pictures with some of the hashes are not here.
        """
        index: dict[str, Picture] = {}
        for picture in self:
            index.setdefault(picture.sha256, picture)
        wanted = list(dict.fromkeys(hashes))
        missing = [digest for digest in wanted if digest not in index]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(wanted)} pictures of the split are not among the "
                f"{len(self)} pictures given (the first has sha256 {missing[0][:12]}…); "
                "give the folder the split was made from"
            )
        return Pictures([index[digest] for digest in wanted], self.layout, self.skipped, self.notes)
