"""What the header of a LoRA, and the files around it, tell about the training data and its owner."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffward.lora.file import PEFT_CONFIG, LoraFile
from diffward.lora.header import read_header
from diffward.lora.leak_rules import describe, find_paths
from diffward.lora.policy import clean_adapter_config, is_harmless, kept_value
from diffward.lora.source import PickleSource, archive_root

# Entries of words that PEFT itself writes.
_PEFT_WORDS = {
    "peft_type", "task_type", "revision", "bias", "init_lora_weights", "peft_version", "layers_pattern",
    "base_model_name_or_path", "megatron_core", "trainable_token_indices", "target_modules", "exclude_modules",
}  # fmt: skip


@dataclass(frozen=True)
class Leak:
    """One entry that tells something. `reveals` is a sentence with the facts.

    `category`: captions, folders, counts, paths, times, names, seeds, settings, pictures or unknown.
    """

    key: str
    reveals: str
    category: str = "unknown"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def header_leaks(metadata: dict[str, str]) -> list[Leak]:
    """Every entry of a safetensors `__metadata__` that tells of captions, folders, files, counts,
    paths, times, people or machines; entries nobody knows are listed as not checked."""
    leaks = []
    for key, value in metadata.items():
        if is_harmless(key, value) or kept_value(key, value) == value:
            continue
        found = describe(key, value, metadata)
        if found is not None:
            leaks.append(Leak(key, found[1], found[0]))
    return leaks


def file_leaks(file: LoraFile) -> list[Leak]:
    """All leaks of an opened LoRA: its header, its PEFT configuration, its archive, its README."""
    leaks = header_leaks(file.metadata)
    for component, config in file.configs.items():
        prefix = f"{component}/" if component else ""
        leaks += _config_leaks(config, f"{prefix}{PEFT_CONFIG}")
    for source in file.parts:
        if isinstance(source, PickleSource):
            leaks += _archive_leaks(source.path)
    leaks += _embedding_leaks(file.extras)
    if file.path.is_dir():
        leaks += _neighbour_leaks(file.path)
    return leaks


def model_leaks(path: Path, metadata: Mapping[str, str]) -> list[Leak]:
    """What a full model tells beside its weights.

    Of a file: its header (`metadata`). Of a folder: the headers of all weights in it, archives' names, pictures,
    training states, and paths in what is JSON.
    """
    if path.is_file():
        return [*header_leaks(dict(metadata)), *_archive_leaks(path)]
    leaks = []
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.suffix == ".safetensors":
            found = header_leaks(read_header(file).metadata)
            leaks += [replace(leak, key=f"{name}:{leak.key}") for leak in found]
        elif file.suffix == ".bin":
            leaks += [replace(leak, key=f"{name} {leak.key}") for leak in _archive_leaks(file)]
    return leaks + list(_neighbour_leaks(path))


def _config_leaks(config: dict, where: str) -> Iterable[Leak]:
    kept = clean_adapter_config(config)
    for key, value in config.items():
        if key in kept or value in (None, False, True, [], {}, ""):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        paths = find_paths(text)
        if paths:
            yield Leak(f"{where}:{key}", f"names a local path: {paths[0]!r}", "paths")
        elif isinstance(value, str) and key not in _PEFT_WORDS:  # a base's hub id tells nothing
            kind = "captions" if "prompt" in key or "caption" in key else "unknown"
            yield Leak(f"{where}:{key}", f"an entry that PEFT does not write: {value[:80]!r}", kind)


def _archive_leaks(path: Path) -> Iterable[Leak]:
    root = archive_root(path)
    if root and root not in ("archive", path.stem):
        yield Leak("(archive)", f"the file was first saved under the name {root!r}", "names")


def _embedding_leaks(extras: Iterable[str]) -> Iterable[Leak]:
    names = [name for name in extras if name.startswith(("<", "bundle_emb."))]
    if names:
        shown = ", ".join(sorted(names)[:5])
        yield Leak(
            "(embeddings)",
            f"carries {len(names)} trained embedding{'s' if len(names) > 1 else ''} ({shown}): "
            "the names are the words that call up what was trained",
            "captions",
        )


_VOCABULARIES = ("vocab.json", "tokenizer.json")  # the base's; full of what looks like a path
_CARD = re.compile(r"^\s*(?:datasets?|instance_prompt|validation_prompt|prompt)\s*:\s*(.+)$", re.M)


def _neighbour_leaks(folder: Path) -> Iterable[Leak]:
    """Files that travel with the folder when it is uploaded."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            yield Leak(name, "a picture lies in the folder", "pictures")
        elif path.name in ("optimizer.pt", "optimizer.bin", "training_args.bin", "scheduler.bin"):
            yield Leak(
                name, "a training state: it tells more of the data than the weights", "counts"
            )
        elif path.suffix.lower() == ".json" and path.name not in (PEFT_CONFIG, *_VOCABULARIES):
            yield from _text_leaks(path, name)
        elif path.name.lower() == "readme.md":
            text = _read(path)
            for line in _CARD.findall(text)[:3]:
                yield Leak(name, f"the model card says {line.strip()[:120]!r}", "captions")
            yield from _text_leaks(path, name)


def _text_leaks(path: Path, name: str) -> Iterable[Leak]:
    paths = find_paths(_read(path))
    if paths:
        yield Leak(name, f"names a local path: {paths[0]!r}", "paths")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1_000_000).decode("utf-8", errors="replace")
    except OSError:
        return ""
