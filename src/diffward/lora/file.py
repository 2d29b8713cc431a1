"""Opening a LoRA: find its weights, tell its layout, know its modules; no tensor is read for that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffward.errors import InputError
from diffward.files import sha256_file
from diffward.lora.family import base_family, family_conflict
from diffward.lora.shapes import factors_agree, kind_of, rank_of, weight_shape
from diffward.lora.sniff import Layout, sniff, sniff_list
from diffward.lora.source import PickleSource, Source, open_source

if TYPE_CHECKING:
    import torch

    from diffward.lora.weights import LoraWeights

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
ADAPTER_METADATA = "lora_adapter_metadata"
_PEFT_TYPES = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class Entry:
    """A module as the file describes it: which tensor plays which role, ranks and shapes."""

    name: str
    kind: str
    keys: dict[str, str]
    source: Source = field(repr=False)
    rank: int
    shape: tuple[int, ...]
    config: dict[str, Any] = field(repr=False)

    @property
    def factors(self) -> dict[str, str]:
        """Tensor keys by role, alpha left out."""
        return {role: key for role, key in self.keys.items() if role != "alpha"}

    @property
    def dtype(self) -> str:
        return self.source.dtypes[next(iter(self.factors.values()))]

    @property
    def parameters(self) -> int:
        total = 0
        for key in self.factors.values():
            count = 1
            for size in self.source.shapes[key]:
                count *= size
            total += count
        return total

    def alpha(self) -> float | None:
        """From the module's own tensor, else from the adapter's configuration, else None."""
        key = self.keys.get("alpha")
        if key is None:
            alpha = self.config.get("alpha")
            return None if alpha is None else float(alpha)
        if self.source.shapes[key] not in ((), (1,)):
            raise InputError(f"{self.source.path}: {key!r} is not a single number")
        return float(self.source.array(key).reshape(()))

    def scale_override(self) -> float | None:
        """The factor of the product where it is not alpha / rank."""
        # LyCORIS ignores alpha for a LoKr of two full factors; PEFT does not.
        if self.kind != "lora" and {"lokr_w1", "lokr_w2"} <= self.keys.keys() and not self.config:
            return 1.0
        if self.config.get("rslora") and (alpha := self.alpha()) is not None:
            return alpha / self.rank**0.5
        return None


@dataclass
class LoraFile:
    """A LoRA on disk. `parts` holds more than one source only for a PEFT folder of several models.

    `format`: diffusers, diffusers-old, peft, kohya, comfyui, cloneofsimo, cloneofsimo-list,
    embedding. `kind`: lora, locon, loha, lokr, dora, textual_inversion.
    """

    path: Path
    format: str
    kind: str
    entries: dict[str, Entry]
    extras: dict[str, tuple[Source, str]]
    metadata: dict[str, str]
    parts: list[Source]
    configs: dict[str, dict[str, Any]]

    @property
    def weights_path(self) -> Path:
        """The (first) file that holds the tensors."""
        return self.parts[0].path

    @cached_property
    def base_family(self) -> str:
        if self.kind == "textual_inversion":
            widths = {source.shapes[key][-1] for source, key in self.extras.values()}
            return {768: "sd1", 1024: "sd2", 1280: "sdxl"}.get(max(widths, default=0), "unknown")
        return base_family({name: entry.shape for name, entry in self.entries.items()})

    @property
    def family_conflict(self) -> str | None:
        """A sentence where the metadata claims another base than the shapes show."""
        return family_conflict(self.base_family, self.metadata)

    @cached_property
    def sha256(self) -> str:
        """Of the weights file; of all files and settings where there is more than one."""
        if len(self.parts) == 1 and not self.configs:
            return sha256_file(self.weights_path)
        told = [sha256_file(part.path) for part in self.parts]
        told.append(json.dumps(self.configs, sort_keys=True, default=str))
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(source.path.stat().st_size for source in self.parts)

    def load(self, *, dtype: torch.dtype | str | None = "float32") -> LoraWeights:
        """Read the tensors. `dtype=None` keeps the file's. Raises `InputError` on NaN tensors."""
        from diffward.lora.weights import load_weights

        return load_weights(self, dtype)


def open_lora(path: str | Path) -> LoraFile:
    """Open a LoRA file, a PEFT folder, or a folder with `pytorch_lora_weights.safetensors`.

    Reads headers only (a pickle has to be unpickled, restricted to tensors). Raises `InputError`,
    one line, for whatever is not a readable adapter.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = list(_find(path)) if path.is_dir() else [(path, None, None)]
    if not found:
        raise InputError(
            f"{path}: no adapter in this folder (looked for {PEFT_CONFIG} with {PEFT_WEIGHTS[0]}, "
            f"and for {DIFFUSERS_WEIGHTS[0]})"
        )
    entries: dict[str, Entry] = {}
    extras: dict[str, tuple[Source, str]] = {}
    metadata: dict[str, str] = {}
    parts: list[Source] = []
    layouts: list[Layout] = []
    configs: dict[str, dict[str, Any]] = {}
    for weights, config_path, component in found:
        source = open_source(weights)
        config = _read_config(config_path) if config_path else None
        if config is not None:
            configs[component or ""] = config
        layout = _layout(source, component)
        parts.append(source)
        layouts.append(layout)
        metadata.update(source.metadata)
        entries.update(_entries(layout, source, config))
        extras.update({name: (source, key) for name, key in layout.extras.items()})
    form = "peft" if configs else layouts[0].format
    kinds = [layout.kind for layout in layouts]
    kind = next((kind for kind in kinds if kind not in ("lora", "locon")), max(kinds))
    return LoraFile(path, form, kind, entries, extras, metadata, parts, configs)


def _find(folder: Path) -> Iterator[tuple[Path, Path | None, str | None]]:
    """(weights, PEFT config, component) in a folder; subfolders are components of a PEFT export."""
    if (folder / PEFT_CONFIG).is_file():
        for name in PEFT_WEIGHTS:
            if (folder / name).is_file():
                yield folder / name, folder / PEFT_CONFIG, None
                return
        raise InputError(f"{folder}: has {PEFT_CONFIG} but no {PEFT_WEIGHTS[0]}")
    for name in DIFFUSERS_WEIGHTS:
        if (folder / name).is_file():
            yield folder / name, None, None
            return
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        if (folder / component / PEFT_CONFIG).is_file():
            for weights, config, _ in _find(folder / component):
                yield weights, config, component


def _layout(source: Source, component: str | None) -> Layout:
    if isinstance(source, PickleSource) and source.is_list:
        return sniff_list(source.shapes.values(), source.path)
    return sniff(source.shapes, source.path, component)


def _entries(layout: Layout, source: Source, config: dict[str, Any] | None) -> dict[str, Entry]:
    adapter = _adapter_metadata(source)
    entries = {}
    for name, keys in layout.modules.items():
        shapes = {role: source.shapes[key] for role, key in keys.items() if role != "alpha"}
        if not factors_agree(shapes):
            raise InputError(
                f"{source.path}: the factors of module {name!r} do not fit together "
                f"({', '.join(f'{role} {list(shape)}' for role, shape in shapes.items())})"
            )
        shape = weight_shape(shapes)
        settings = _settings(
            name, config if config is not None else adapter.get(name.split(".")[0])
        )
        full = {"lokr_w1", "lokr_w2"} <= shapes.keys()
        rank = settings["rank"] if full and settings.get("rank") else rank_of(shapes)
        entries[name] = Entry(name, kind_of(keys, shape), keys, source, rank, shape, settings)
    return entries


def _settings(name: str, config: dict[str, Any] | None) -> dict[str, Any]:
    """Alpha, rank and scaling that a PEFT configuration gives one module."""
    if not config or not ("lora_alpha" in config or "alpha" in config):
        return {}
    path = name.partition(".")[2]

    def pattern(table: Any, default: Any) -> Any:
        for key, value in table.items() if isinstance(table, dict) else ():
            try:
                # PEFT matches its patterns so: the end of the path, after a dot.
                if re.match(rf"(.*\.)?({key})$", path):
                    return value
            except re.error:
                continue
        return default

    settings = {
        "alpha": pattern(
            config.get("alpha_pattern"), config.get("lora_alpha", config.get("alpha"))
        ),
        "rank": pattern(config.get("rank_pattern"), config.get("r")),
        "rslora": config.get("use_rslora") is True,
    }
    for key in ("alpha", "rank"):
        value = settings[key]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise InputError(f"adapter configuration of {name}: {key} is not a number")
    if settings["rank"] is not None:
        settings["rank"] = int(settings["rank"])
        if settings["rank"] < 1:
            raise InputError(f"adapter configuration of {name}: rank {settings['rank']}")
    return settings


def _adapter_metadata(source: Source) -> dict[str, dict[str, Any]]:
    """diffusers' `lora_adapter_metadata`: {component: LoraConfig as a dict}."""
    text = source.metadata.get(ADAPTER_METADATA)
    if not text:
        return {}
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{source.path}: {ADAPTER_METADATA} in the header is not JSON") from None
    result: dict[str, dict[str, Any]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        component, _, setting = key.partition(".")
        result.setdefault(component, {})[setting] = value
    return result


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({str(error)[:80]})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is not a PEFT configuration")
    peft_type = config.get("peft_type")
    if peft_type not in _PEFT_TYPES:
        raise InputError(
            f"{path}: the PEFT type {peft_type!r} is not supported; known: {', '.join(_PEFT_TYPES)}"
        )
    return config
