"""Rules that put a header entry into words: (category, sentence), or None where it tells nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

Found = tuple[str, str] | None

_PATH = re.compile(
    r"""(?<![\w:/\\.-])(?:[A-Za-z]:[\\/](?![\\/]*$)|\\\\[\w.-]+\\|~[\\/]|/(?=[\w. -]+/)|\.{1,2}[\\/])"""
    r"""[^"'<>|\n,;{}\[\]]{2,200}"""
)
_FILE = re.compile(
    r"[\w() .-]{1,80}\.(?:png|jpe?g|webp|bmp|txt|safetensors|ckpt|pt|toml|json|ya?ml)\b"
)


def find_paths(text: str) -> list[str]:
    """What looks like a path of somebody's disk; web addresses are not."""
    found = [match[0] for match in _PATH.finditer(text)]
    if not found:  # JSON inside JSON doubles its backslashes
        found = [match[0] for match in _PATH.finditer(text.replace("\\\\", "\\"))]
    return [path.strip()[:120] for path in found]


def describe(key: str, value: str, metadata: dict[str, str]) -> Found:
    """What one header entry tells. Entries of no known meaning come back as `unknown`."""
    if value.strip() in ("", "None", "{}", "[]", "null", '""'):
        return None
    rule = _RULES.get(key)
    found = rule(value, metadata) if rule is not None else _generic(key, value)
    if found is None:
        return None
    # Printed on terminals: no control characters of somebody else's file.
    return found[0], "".join(c if c.isprintable() else " " for c in found[1])


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _quote(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _plural(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def tags_of(value: Any) -> tuple[Counter[str], list[str]]:
    """(tag counts, folder names) of a kohya tag table {folder: {tag: count}}."""
    tags: Counter[str] = Counter()
    folders: list[str] = []
    for folder, table in value.items() if isinstance(value, dict) else ():
        folders.append(str(folder))
        for tag, count in table.items() if isinstance(table, dict) else ():
            tags[str(tag).strip()] += int(_number(count) or 0)
    return tags, folders


def _tags(value: str, _: dict[str, str]) -> Found:
    tags, folders = tags_of(_json(value))
    if not tags:
        return "captions", f"a table of training tags, unreadable: {value[:80]!r}"
    whole = [tag for tag in tags if len(tag.split()) > 6]
    top = ", ".join(f"{tag[:40]!r} ({count})" for tag, count in tags.most_common(5))
    text = (
        f"{_plural(len(tags), 'distinct training tag')} with how often each was used, "
        f"from {_plural(len(folders), 'folder')} ({_quote(folders)}); most frequent: {top}"
    )
    if whole:
        text += (
            f"; {len(whole)} of them are whole captions, word for word, such as {whole[0][:100]!r}"
        )
    return "captions", text


def _folders(value: str, _: dict[str, str]) -> Found:
    data = _json(value)
    if not isinstance(data, dict) or not data:
        return "folders", f"the training folders: {value[:120]!r}"
    counts = [int(_number(e.get("img_count")) or 0) for e in data.values() if isinstance(e, dict)]
    repeats = [int(_number(e.get("n_repeats")) or 0) for e in data.values() if isinstance(e, dict)]
    text = f"{_plural(len(data), 'training folder')} by name ({_quote(list(data))})"
    if any(counts):
        text += f" with {_plural(sum(counts), 'picture')} ({' + '.join(map(str, counts[:8]))})"
    if any(repeats):
        text += f", repeated {', '.join(map(str, repeats[:8]))} times an epoch"
    return "folders", text


def _datasets(value: str, _: dict[str, str]) -> Found:
    data = _json(value)
    subsets = [
        subset
        for dataset in (data if isinstance(data, list) else [])
        if isinstance(dataset, dict)
        for subset in dataset.get("subsets", [])
        if isinstance(subset, dict)
    ]
    if not subsets:
        return "folders", f"the configuration of the data sets: {value[:120]!r}"
    names = [str(s["image_dir"]) for s in subsets if s.get("image_dir")]
    pictures = sum(int(_number(s.get("img_count")) or 0) for s in subsets)
    text = f"{_plural(len(subsets), 'data set')} ({_quote(names)})"
    if pictures:
        text += f" with {_plural(pictures, 'picture')}"
    words = [str(s[k]) for s in subsets for k in ("class_tokens", "caption_prefix") if s.get(k)]
    if words:
        text += f", trained on the words {_quote(words)}"
    tags: Counter[str] = Counter()
    for dataset in data:
        if isinstance(dataset, dict):
            tags += tags_of(dataset.get("tag_frequency"))[0]
    if tags:
        text += f", and {_plural(len(tags), 'distinct training tag')}"
    return "folders", text


def _buckets(value: str, _: dict[str, str]) -> Found:
    data = _json(value)
    buckets = data.get("buckets") if isinstance(data, dict) else None
    if not isinstance(buckets, dict) or not buckets:
        return ("counts", "sizes of the training pictures") if data else None
    entries = [entry for entry in buckets.values() if isinstance(entry, dict)]
    total = sum(int(_number(entry.get("count")) or 0) for entry in entries)
    return (
        "counts",
        f"the shapes of the training pictures: {_plural(len(entries), 'aspect ratio')}, "
        f"{_plural(total, 'picture')} an epoch, repeats counted",
    )


def _images(value: str, _: dict[str, str]) -> Found:
    count = _number(value)
    return (
        ("counts", f"{_plural(count, 'training picture')} an epoch, repeats counted")
        if count
        else None
    )


def _reg_images(value: str, _: dict[str, str]) -> Found:
    count = _number(value)
    return ("counts", f"{_plural(count, 'regularisation picture')}") if count else None


def _count(what: str, tells: str) -> Callable[[str, dict[str, str]], Found]:
    def rule(value: str, metadata: dict[str, str]) -> Found:
        text = f"{what}: {value[:60]}"
        batch = _number(
            metadata.get("ss_total_batch_size") or metadata.get("ss_batch_size_per_device")
        )
        number = _number(value)
        if what == "batches an epoch" and batch and number:
            return "counts", f"{text}; of {batch:.0f} each: about {number * batch:,.0f} pictures"
        return "counts", f"{text} ({tells})"

    return rule


def _time(what: str) -> Callable[[str, dict[str, str]], Found]:
    def rule(value: str, _: dict[str, str]) -> Found:
        seconds = _number(value)
        if seconds is not None and 1e9 < seconds < 4e9:
            value = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return "times", f"{what} {value[:60]}"

    return rule


def _says(category: str, what: str) -> Callable[[str, dict[str, str]], Found]:
    def rule(value: str, _: dict[str, str]) -> Found:
        return category, f"{what}: {value[:160]!r}"

    return rule


def _picture(value: str, _: dict[str, str]) -> Found:
    return "pictures", f"a picture of {len(value) * 3 // 4 // 1024:,} KB is embedded"


def _software(value: str, _: dict[str, str]) -> Found:
    data = _json(value)
    if isinstance(data, dict):
        value = ", ".join(f"{k} {v}" for k, v in data.items() if isinstance(v, str | int | float))
    return "settings", f"the program that trained it: {value[:160]}"


def _config(value: str, metadata: dict[str, str]) -> Found:
    paths = find_paths(value)
    prompts = re.findall(r'"(?:prompt|caption|text|trigger_word)s?":\s*"([^"]{3,})"', value)
    text = f"a whole training configuration ({len(value):,} characters)"
    if paths:
        text += f" with {_plural(len(paths), 'local path')}, such as {paths[0]!r}"
    if prompts:
        text += f", and prompts, such as {prompts[0][:100]!r}"
    return ("paths" if paths else "settings"), text


_SIZE = "with the batch size and the epochs it tells the data set's size"
_PASSES = "with the steps it tells the data set's size"
_STEPS = "with the steps and the epochs it tells the data set's size"
_RULES: dict[str, Callable[[str, dict[str, str]], Found]] = {
    "ss_tag_frequency": _tags,
    "ss_dataset_dirs": _folders,
    "ss_reg_dataset_dirs": _folders,
    "ss_datasets": _datasets,
    "ss_bucket_info": _buckets,
    "ss_num_train_images": _images,
    "ss_num_validation_images": _images,
    "ss_num_reg_images": _reg_images,
    "ss_num_batches_per_epoch": _count("batches an epoch", _SIZE),
    "ss_num_epochs": _count("epochs", _PASSES),
    "ss_epoch": _count("epochs trained", _PASSES),
    "ss_steps": _count("steps trained", _SIZE),
    "ss_max_train_steps": _count("steps planned", _SIZE),
    "ss_lr_warmup_steps": _count(
        "warm-up steps", "usually a fixed share of all steps, which tell the data set's size"
    ),
    "ss_batch_size_per_device": _count("pictures a batch", _STEPS),
    "ss_total_batch_size": _count("pictures a batch, all devices", _STEPS),
    "ss_training_started_at": _time("training began"),
    "ss_training_finished_at": _time("training ended"),
    "modelspec.date": _time("made"),
    "ss_session_id": _says("names", "the id of the training session, equal in all its files"),
    "ss_seed": _says("seeds", "the random seed, with which the order of the data can be redone"),
    "ss_output_name": _says("names", "the name the trainer gave it"),
    "ss_sd_model_name": _says("names", "the file name of the base on the trainer's disk"),
    "ss_vae_name": _says("names", "the file name of the VAE on the trainer's disk"),
    "ss_training_comment": _says("captions", "the trainer's comment"),
    "ss_sd_scripts_commit_hash": _says("settings", "the exact version of the training program"),
    "ss_wandb_run": _says("names", "the run in an outside log"),
    "modelspec.title": _says("names", "the title"),
    "modelspec.author": _says("names", "the author"),
    "modelspec.description": _says("captions", "the description"),
    "modelspec.tags": _says("captions", "the tags"),
    "modelspec.trigger_phrase": _says("captions", "the phrase that calls up what was trained"),
    "modelspec.usage_hint": _says("captions", "the usage hint"),
    "modelspec.license": _says("names", "the licence"),
    "modelspec.merged_from": _says("names", "the files it was merged from"),
    "modelspec.hash_sha256": lambda value, _: None,
    "modelspec.thumbnail": _picture,
    "thumbnail": _picture,
    "software": _software,
    "training_info": _count("training progress", _PASSES),
    "name": _says("names", "the name the trainer gave it"),
    "ot_config": _config,
    "ot_branch": _says("settings", "the version of the training program"),
    "ot_revision": _says("settings", "the version of the training program"),
    "training_config": _config,
    "lora_adapter_metadata": _config,
    "version": lambda value, _: (
        None if re.fullmatch(r"[\w.+-]{1,20}", value) else _generic("", value)
    ),
}

_HOST = re.compile(r"host|machine|user|login|author|e-?mail|computer|owner", re.I)
_PROMPT = re.compile(r"prompt|caption|instance|trigger|token|concept|comment|description", re.I)
_NUMBERISH = re.compile(r"num_|count|n_images|images|steps|epoch|batch", re.I)


def _generic(key: str, value: str) -> Found:
    if value.startswith("data:image"):
        return _picture(value, {})
    paths = find_paths(value)
    if paths:
        extra = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        return "paths", f"names a local path: {paths[0]!r}{extra}"
    if _HOST.search(key):
        return "names", f"a person or a machine: {value[:120]!r}"
    if re.search(r"[\w.+-]+@[\w-]+\.\w{2,}", value):
        return "names", f"an e-mail address in {value[:120]!r}"
    number = _number(value)
    if number is not None and 1e9 < number < 4e9 and re.search(r"time|date|at$|start|end", key):
        return _time("a time:")(value, {})
    if re.search(r"\b20\d\d-[01]\d-[0-3]\d\b", value):
        return "times", f"a date: {value[:80]!r}"
    files = _FILE.findall(value)
    if files:
        return "names", f"names {_plural(len(files), 'file')}, such as {files[0].strip()!r}"
    if _PROMPT.search(key) and number is None and value not in ("True", "False"):
        return "captions", f"words of the training: {value[:120]!r}"
    if _NUMBERISH.search(key) and number is not None:
        return "counts", f"a count: {value[:40]}"
    words = re.findall(r"[^\W\d_]{2,}", value)
    if len(words) >= 6 and not value.lstrip().startswith(("{", "[")):
        return "captions", f"looks like a caption or a note: {value[:120]!r}"
    return "unknown", f"unrecognised entry, not checked: {value[:80]!r}"
