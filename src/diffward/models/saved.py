"""Models on disk, opened to be read a tensor at a time under diffusers' names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from diffward.errors import InputError
from diffward.lora.source import Source, open_source

Shapes = Mapping[str, tuple[int, ...]]

_WEIGHTS = re.compile(
    r"^(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d{5}-of-\d{5})?(?:\.([\w-]+?))??"
    r"(?:-\d{5}-of-\d{5})?\.(safetensors|bin)$"
)
_WRAPPERS = ("", "unet.", "module.", "_orig_mod.")
_LDM = ("model.diffusion_model.", "diffusion_model.", "")
_TEXT = ("cond_stage_model.transformer.", "cond_stage_model.model.", "cond_stage_model.")
# OpenCLIP's names of the text encoder (single files of Stable Diffusion 2.x), and CLIP's.
_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.": "final_layer_norm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}


@dataclass
class Weights(Mapping[str, Tensor]):
    """Tensors by name that lie in files; each is read when asked for and not kept.

    A pickle (`.ckpt`, `.bin`) cannot be read in parts: it is in memory as long as this is.

    Attributes:
        wanted: shapes that the reader has in mind: a matrix is given the shape that it has there.
        thirds: names that are the first, second or third part (0, 1, 2) of the rows of their tensor.
    """

    where: str
    places: dict[str, tuple[Source, str]]
    wanted: Shapes = field(default_factory=dict)
    thirds: dict[str, int] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """As wanted, where the file has the same matrix (a 1 x 1 convolution is one too)."""
        source, key = self.places[name]
        shape, wanted = tuple(source.shapes[key]), self.wanted.get(name, ())
        if name in self.thirds:
            shape = (shape[0] // 3, *shape[1:])
        return wanted if _squeezed(shape) == _squeezed(wanted) else shape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self.places}

    def __getitem__(self, name: str) -> Tensor:
        source, key = self.places[name]
        tensor = source.tensor(key)
        if not tensor.is_floating_point():
            raise InputError(
                f"{source.path}: {key} is {source.dtypes[key]}, so the model is quantised; give it in floats"
            )
        if (part := self.thirds.get(name)) is not None:
            tensor = tensor.tensor_split(3)[part].clone()
        return tensor.reshape(self.shape(name))

    def __contains__(self, name: object) -> bool:
        return name in self.places  # what a Mapping does by itself would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class Saved:
    """What of a model was found at a path.

    Attributes:
        copies: UNets by what they are: "" is the one that loaders take, "ema" its moving average, others are
            variants that lie beside it ("fp16"). Empty where there is none.
        text: the text encoder, if there is one, under CLIP's names without `text_model.`.
    """

    where: str
    copies: dict[str, Weights] = field(default_factory=dict)
    text: Weights | None = None

    @property
    def unet(self) -> Weights:
        return self.copies[""]


def open_saved(path: Path, wanted: Shapes) -> Saved:
    """Open a diffusers pipeline or UNet folder, or a file of either layout; headers are read, no tensor.

    Keys of the original layout (`model.diffusion_model.…`) get diffusers' names from diffusers' own conversion,
    which for the UNet of Stable Diffusion 1.x and 2.x only renames: it is given names in the place of tensors.

    Args:
        wanted: shapes of the UNet's parameters by name, of the model that this should be.

    Raises:
        InputError: damaged, or a LoRA's layers lie among the weights.
    """
    return _folder(path, wanted) if path.is_dir() else _file(path, wanted)


def main_files(folder: Path) -> list[Path]:
    """The files of weights in a folder that loaders take; several where they are sharded."""
    files = _variants(folder)
    return files["" if "" in files else min(files)] if files else []


def holds_unet(keys: Iterable[str]) -> bool:
    """Whether the UNet of a Stable Diffusion model is among these tensors, in either layout."""
    keys = set(keys)
    return any(f"{prefix}input_blocks.0.0.weight" in keys for prefix in _LDM) or any(
        {f"{prefix}conv_in.weight", f"{prefix}time_embedding.linear_1.weight"} <= keys
        for prefix in _WRAPPERS
    )


def _folder(path: Path, wanted: Shapes) -> Saved:
    model = Saved(str(path))
    for folder, kind in ((path / "unet", ""), (path, ""), (path / "unet_ema", "ema")):
        files = _variants(folder)
        if not files or (kind in model.copies):
            continue
        main = "" if "" in files else min(files)
        for variant, found in files.items():
            label = kind if variant == main else f"{kind} {variant}".strip()
            model.copies[label] = _under_names([open_source(f) for f in found], wanted, str(folder))
    if text := main_files(path / "text_encoder"):
        model.text = _text([open_source(f) for f in text], ("",), str(path))
    return model


def _file(path: Path, wanted: Shapes) -> Saved:
    source = open_source(path)
    if not _names(source.shapes, wanted):
        return Saved(str(path))
    model = Saved(str(path), {"": _under_names([source], wanted, str(path))})
    averaged = {}
    for name, (_, key) in model.unet.places.items():
        # The original code writes its moving average without the dots of the names.
        ema = "model_ema." + "".join(key.split(".")[1:])
        if key.startswith("model.") and ema in source.shapes:
            averaged[name] = (source, ema)
    if averaged:
        model.copies["ema"] = Weights(f"{path} (EMA)", averaged, model.unet.wanted)
    model.text = _text([source], _TEXT, str(path))
    return model


def _variants(folder: Path) -> dict[str, list[Path]]:
    """Files of weights in a folder by variant, "" the plain one; a second format of it is a variant too."""
    if not folder.is_dir():
        return {}
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and (match := _WEIGHTS.match(file.name)):
            found.setdefault((match[1] or "", match[2]), []).append(file)
    return {
        f"{variant} bin".strip()
        if form == "bin" and (variant, "safetensors") in found
        else variant: files
        for (variant, form), files in found.items()
    }


def _under_names(sources: list[Source], wanted: Shapes, where: str) -> Weights:
    own = {key: source for source in sources for key in source.shapes}
    places = {name: (own[key], key) for name, key in _names(own, wanted).items()}
    return Weights(where, places, dict(wanted))


def _names(keys: Iterable[str], wanted: Shapes) -> dict[str, str]:
    """{name of the UNet's parameter in diffusers: key}, or {} if there is no UNet among the keys."""
    keys = set(keys)
    for prefix in _LDM:
        if f"{prefix}input_blocks.0.0.weight" in keys:
            return _original(keys, prefix, wanted)
    for prefix in _WRAPPERS:
        if any(f"{prefix}{name}" in keys for name in wanted):
            break
    else:
        return {}
    if adapter := next((key for key in keys if ".lora_" in key), None):
        raise InputError(
            f"{adapter}: is a LoRA layer among the weights of a UNet; save the adapter as a file of its own "
            "and give each by itself"
        )
    return {
        key.removeprefix(prefix).replace(".base_layer.", "."): key
        for key in keys
        if key.startswith(prefix)
    }


def _original(keys: Iterable[str], prefix: str, wanted: Shapes) -> dict[str, str]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    resnets = [re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name) for name in wanted]
    layers = 1 + max((int(match[1]) for match in resnets if match), default=1)
    # Tensors are only moved from name to name, so names may stand for them.
    marks = {
        f"model.diffusion_model.{k.removeprefix(prefix)}": k for k in keys if k.startswith(prefix)
    }
    found: dict[str, str] = convert_ldm_unet_checkpoint(marks, {"layers_per_block": layers})
    return {name: key for name, key in found.items() if key}


def _text(sources: list[Source], prefixes: tuple[str, ...], where: str) -> Weights | None:
    places = {}
    for source in sources:
        for key in source.shapes:
            if (prefix := next((p for p in prefixes if key.startswith(p)), None)) is not None:
                places[key.removeprefix(prefix).removeprefix("text_model.")] = (source, key)
    if any(name.startswith("transformer.resblocks.") for name in places):
        return _open_clip(places, where)
    return Weights(where, places) if places else None


def _open_clip(places: dict[str, tuple[Source, str]], where: str) -> Weights:
    """OpenCLIP's text encoder under CLIP's names; it keeps queries, keys and values in one matrix."""
    found = Weights(where, {})
    for old, place in places.items():
        name = old
        for theirs, ours in _OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        stem, together, leaf = name.partition("in_proj_")
        if not together:
            found.places[name] = place
            continue
        for part, letter in enumerate("qkv"):
            whole = f"{stem}{letter}_proj.{leaf}"
            found.places[whole], found.thirds[whole] = place, part
    return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix's shape without the kernel of one pixel."""
    return shape[:2] if len(shape) == 4 and math.prod(shape[2:]) == 1 else shape
