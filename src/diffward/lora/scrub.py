"""Removing from a LoRA what tells of the data, and nothing else: the tensors stay bit for bit."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffward.errors import InputError
from diffward.files import atomic_path, write_json
from diffward.lora.file import PEFT_CONFIG, LoraFile, open_lora
from diffward.lora.header import read_header
from diffward.lora.leak_rules import describe
from diffward.lora.leaks import Leak
from diffward.lora.policy import clean_adapter_config, kept_value
from diffward.lora.source import SafetensorsSource

_CHUNK = 1 << 20


@dataclass
class ScrubResult:
    """`kept`: keys that stayed (some with a filtered value). `removed`: what went, and what it told.

    `remarks`: what scrubbing a header cannot remove (names of embeddings, the weights themselves).
    """

    kept: list[str] = field(default_factory=list)
    removed: list[Leak] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "removed": [leak.to_dict() for leak in self.removed],
            "remarks": self.remarks,
        }


def scrub_lora(path: str | Path, out: str | Path, *, keep_trigger: bool = False) -> ScrubResult:
    """Copy a LoRA, its header reduced to the whitelist of `policy`, its tensors bit for bit.

    `keep_trigger` keeps `modelspec.trigger_phrase`. A PEFT folder becomes a folder with the weights
    and a reduced `adapter_config.json`; nothing else in it is copied. Raises `InputError` for a
    pickle (convert it) and for whatever `open_lora` refuses; then nothing is written.
    """
    out = Path(out)
    file = open_lora(path)
    if out.exists() and out.samefile(path):
        raise InputError(f"{out}: would overwrite the file it is made from; give another --out")
    for source in file.parts:
        if not isinstance(source, SafetensorsSource):
            raise InputError(
                f"{source.path}: is a pickle, which has no header to scrub; convert it first "
                "(diffward convert), that writes nothing about the data"
            )
    result = ScrubResult()
    if not file.path.is_dir():
        if out.is_dir():
            raise InputError(f"{out}: is a folder; give a file name")
        _scrub_file(file.path, out, keep_trigger, result)
    else:
        if out.is_file():
            raise InputError(f"{out}: is a file; scrubbing a folder makes a folder")
        _scrub_folder(file, out, keep_trigger, result)
    if file.extras:
        result.remarks.append(
            f"the embeddings {', '.join(file.extras)} keep their names: loaders need them"
        )
    return result


def _scrub_folder(file: LoraFile, out: Path, keep_trigger: bool, result: ScrubResult) -> None:
    for source in file.parts:
        inside = source.path.relative_to(file.path)
        _scrub_file(source.path, out / inside, keep_trigger, result)
        config = file.configs.get("" if inside.parent == Path() else inside.parent.name)
        if config is None:
            continue
        kept = clean_adapter_config(config)
        for key, value in config.items():
            name = f"{inside.parent / PEFT_CONFIG}:{key}"
            if key in kept:
                result.kept.append(name)
            elif value not in (None, False, [], {}, ""):
                result.removed.append(Leak(name, f"was {json.dumps(value)[:120]}", "settings"))
        write_json(out / inside.parent / PEFT_CONFIG, kept)


def _scrub_file(path: Path, out: Path, keep_trigger: bool, result: ScrubResult) -> None:
    header = read_header(path)
    kept: dict[str, str] = {}
    for key, value in header.metadata.items():
        clean = kept_value(key, value, keep_trigger=keep_trigger)
        if clean is not None:
            kept[key] = clean
        if clean != value:
            category, reveals = describe(key, value, header.metadata) or (
                "settings",
                "not needed by any loader",
            )
            result.removed.append(Leak(key, reveals, category))
    result.kept += list(kept)
    # Entries rebuilt from what was checked: the raw ones may carry fields of their own.
    raw: dict[str, Any] = {"__metadata__": kept} if kept else {}
    for name, info in header.tensors.items():
        offsets = [info.start - header.data_start, info.end - header.data_start]
        raw[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(raw, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(out) as temporary, temporary.open("wb") as target, path.open("rb") as source:
        target.write(struct.pack("<Q", len(text)))
        target.write(text)
        source.seek(header.data_start)
        while chunk := source.read(_CHUNK):
            target.write(chunk)
