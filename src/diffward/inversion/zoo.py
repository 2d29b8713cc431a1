"""A zoo on disk: many LoRAs of one base in sharded safetensors, and a parquet manifest that says how each was made.

A row is one save of one LoRA. Rows are told apart by `lora` and `step`; `identity` is the subject, and the split
goes by it, never by save. Factors are kept in half precision as the trainer left them, A and B apart.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.errors import InputError
from diffward.files import atomic_path, sha256_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from diffward.inversion.recipe import Recipe
    from diffward.lora import LoraWeights

SCHEMA = "diffward.zoo/1"
HEAD, MANIFEST, LOCK = "zoo.json", "manifest.parquet", "lock"
SPLITS = ("train", "valid", "test")
_PLACE = ("lora", "identity", "split", "shard", "place", "step")
_LABEL = "is_"  # columns of the subjects' attributes


@dataclass(frozen=True)
class Row:
    """Where one save lies: shard and place in it; whose it is and how it was made."""

    lora: int
    identity: int
    split: str
    shard: int
    place: int
    step: int
    recipe: dict[str, Any]
    label: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """What a zoo's LoRAs have in common."""

    base: str
    base_identity: str
    resolution: int
    subjects: str
    subjects_digest: str
    attributes: dict[str, list[str]]
    seed: int
    count: int
    per_shard: int
    test_share: float
    ranges: dict[str, Any]
    modules: dict[str, list[int]]

    @property
    def shards(self) -> int:
        return -(-self.count // self.per_shard)

    def split(self, identity: int) -> str:
        """By the subject alone: a share for testing, half as many for validation, the rest trains."""
        u = np.random.default_rng([self.seed, 43, identity]).random()
        if u < self.test_share:
            return "test"
        return "valid" if u < 1.5 * self.test_share else "train"


class Zoo:
    """An opened zoo; damaged or missing shards are left out and named in `damaged`.

    Raises:
        InputError: no zoo there, or one that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.head = read_head(self.folder)
        rows, sums = read_manifest(self.folder, self.head)
        self.damaged = [
            s for s, sum_ in sums.items() if not _whole(shard_file(self.folder, s), sum_)
        ]
        self.rows = [row for row in rows if row.shard not in self.damaged]

    def __len__(self) -> int:
        return len(self.rows)

    def of_split(self, *splits: str) -> list[Row]:
        return [row for row in self.rows if row.split in splits]

    def last_saves(self, rows: Sequence[Row]) -> list[Row]:
        """Of each LoRA the last save only."""
        last = {row.lora: row for row in sorted(rows, key=lambda row: row.step)}
        return [row for row in rows if last[row.lora] is row]

    def shards(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Of each shard that has some of `rows`: their numbers in `rows`, and factors (n, …) of just these.

        Keys are module.down (n, r, in), module.up (n, out, r), and module.scale (n,), all float32.
        """
        import torch

        by_shard: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            by_shard.setdefault(row.shard, []).append(number)
        for shard, numbers in sorted(by_shard.items()):
            tensors = _load(*_version(shard_file(self.folder, shard)))
            places = torch.tensor([rows[n].place for n in numbers])
            scale = torch.tensor(
                [rows[n].recipe["alpha"] / rows[n].recipe["rank"] for n in numbers]
            )
            found = {key: tensor[places].float() for key, tensor in tensors.items()}
            yield numbers, found | {f"{m}.scale": scale for m in self.head.modules}

    def lora(self, row: Row) -> LoraWeights:
        """One save as the trainer would have written it."""
        from diffward.lora import LoraModule, LoraWeights

        tensors = _load(*_version(shard_file(self.folder, row.shard)))
        modules = {
            name: LoraModule.of(
                name, tensors[f"{name}.down"][row.place].float(), tensors[f"{name}.up"][row.place].float(),
                row.recipe["alpha"],
            )
            for name in self.head.modules
        }  # fmt: skip
        return LoraWeights(modules)


@lru_cache(maxsize=2)
def _load(path: str, written: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _version(file: Path) -> tuple[str, int]:
    """What tells a shard from one that was there before."""
    return str(file), file.stat().st_mtime_ns


def shard_file(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"shard-{shard:05d}.safetensors"


def read_head(folder: Path) -> Head:
    try:
        data = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            raise ValueError
        return Head(**{"subjects_digest": "", **data})
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder}: is no zoo (no readable {HEAD}); make one with diffward zoo build"
        ) from None


def write_head(folder: Path, head: Head) -> None:
    write_json(folder / HEAD, {"schema": SCHEMA, **asdict(head)})


def rows_of(
    head: Head, shard: int, numbers: Sequence[int], recipes: Sequence[Recipe], saves: Sequence[Sequence[int]],
    labels: Sequence[tuple[int, ...]], identities: Sequence[int],
) -> list[Row]:  # fmt: skip
    """The manifest's rows of a shard, in the order in which its tensors are stacked."""
    rows: list[Row] = []
    for lora, recipe, steps, label, identity in zip(
        numbers, recipes, saves, labels, identities, strict=True
    ):
        for step in steps:
            rows.append(
                Row(
                    lora,
                    identity,
                    head.split(identity),
                    shard,
                    len(rows),
                    step,
                    asdict(recipe),
                    label,
                )
            )
    return rows


def write_manifest(folder: Path, head: Head, rows: Sequence[Row], sums: dict[int, str]) -> None:
    """Whole, under a temporary name first."""
    parquet, arrow = need_parquet(), _arrow()
    columns: dict[str, list[Any]] = {key: [getattr(row, key) for row in rows] for key in _PLACE}
    for key in rows[0].recipe if rows else ():
        columns[key] = [row.recipe[key] for row in rows]
    for i, key in enumerate(head.attributes):
        columns[_LABEL + key] = [row.label[i] for row in rows]
    columns["shard_sha256"] = [sums[row.shard] for row in rows]
    with atomic_path(folder / MANIFEST) as temporary:
        parquet.write_table(arrow.table(columns), temporary)


def read_manifest(folder: Path, head: Head) -> tuple[list[Row], dict[int, str]]:
    """All rows, and the hash of each shard; nothing where there is no manifest yet."""
    if not (folder / MANIFEST).exists():
        return [], {}
    parquet = need_parquet()
    try:
        table = parquet.read_table(folder / MANIFEST).to_pylist()
        own = {*_PLACE, "shard_sha256"}
        rows = [
            Row(
                **{key: one[key] for key in _PLACE},
                recipe={k: v for k, v in one.items() if k not in own and not k.startswith(_LABEL)},
                label=tuple(one[_LABEL + key] for key in head.attributes),
            )
            for one in table
        ]
    except Exception as error:
        raise InputError(
            f"{folder / MANIFEST}: cannot be read ({str(error)[:80]}); delete it, and zoo build makes the zoo anew"
        ) from None
    return rows, {one["shard"]: one["shard_sha256"] for one in table}


def _whole(file: Path, sum_: str) -> bool:
    """Size and time of the check are kept beside the file, so that a zoo of gigabytes is hashed once."""
    if not file.exists():
        return False
    mark = file.with_suffix(".checked")
    status = file.stat()
    told = f"{sum_} {status.st_size} {status.st_mtime_ns}"
    if mark.exists() and mark.read_text() == told:
        return True
    if sha256_file(file) != sum_:
        return False
    with contextlib.suppress(OSError):  # a zoo may be read-only
        mark.write_text(told)
    return True


def need_parquet() -> Any:
    """pyarrow's parquet module. Raises `InputError` where it is not installed."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError("a zoo's manifest needs pyarrow (pip install diffward[zoo])") from None
    return parquet


def _arrow() -> Any:
    import pyarrow

    return pyarrow
