"""Models and adapters on disk, opened to be read a tensor at a time under diffusers' names of the UNet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffward.errors import InputError
from diffward.lora import LoraFile, LoraWeights, open_lora
from diffward.lora.file import DIFFUSERS_WEIGHTS, PEFT_CONFIG
from diffward.lora.source import Source, open_source
from diffward.models.load import EMBEDDED

if TYPE_CHECKING:
    from diffward.guard.mask import FreezeMask

_WEIGHTS = re.compile(
    r"^(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d{5}-of-\d{5})?(?:\.([\w-]+?))??"
    r"(?:-\d{5}-of-\d{5})?\.(safetensors|bin)$"
)
_WRAPPERS = ("", "unet.", "module.", "_orig_mod.")
_LDM = ("model.diffusion_model.", "diffusion_model.", "")
_TEXT = ("cond_stage_model.transformer.", "cond_stage_model.model.", "cond_stage_model.")


@dataclass
class Weights(Mapping[str, Tensor]):
    """Tensors by name that lie in files; each is read when asked for and not kept.

    A pickle (`.ckpt`, `.bin`) cannot be read in parts: it is in memory as long as this is.
    """

    where: str
    places: dict[str, tuple[Source, str]]
    wanted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the mask has it, where the file has the same matrix (a 1 x 1 convolution is one too)."""
        source, key = self.places[name]
        shape, wanted = tuple(source.shapes[key]), self.wanted.get(name, ())
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
        return tensor.reshape(self.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass
class Model:
    """What was found at a path.

    Attributes:
        copies: UNets by what they are: "" is the one that loaders take, "ema" its moving average, others are
            variants that lie beside it ("fp16"). Empty for an adapter.
        adapters: LoRAs.
        text: the text encoder, if there is one.
    """

    where: str
    copies: dict[str, Weights] = field(default_factory=dict)
    adapters: list[LoraFile] = field(default_factory=list)
    text: Weights | None = None

    @property
    def unet(self) -> Weights:
        return self.copies[""]


def open_model(path: str | Path, mask: FreezeMask) -> Model:
    """Open a diffusers pipeline or UNet folder, a file of either layout, or a LoRA; headers are read, no tensor.

    Keys of the original layout (`model.diffusion_model.…`) get diffusers' names from diffusers' own conversion,
    which for Stable Diffusion 1.x and 2.x only renames: it is given names in the place of tensors.

    Raises:
        InputError: nothing there, damaged, none of these, or the UNet of another model than the mask's.
    """
    from diffward.models.mini import PIPELINE

    place = PIPELINE if str(path) == EMBEDDED else Path(path)
    if not place.exists():
        raise InputError(
            f"{path}: no such file or folder; give a model or a LoRA that is on this machine"
        )
    model = _folder(place, mask) if place.is_dir() else _file(place, mask)
    for kind, weights in model.copies.items():
        # A moving average need not hold what does not train.
        partial = kind.startswith("ema")
        known = {n: entry.shape for n, entry in mask.tensors.items()} if partial else {}
        mask.check_names(known | weights.shapes, weights.where)
    return model


def split_adapter(weights: LoraWeights, mask: FreezeMask) -> tuple[LoraWeights, LoraWeights]:
    """The part of a LoRA that is on the UNet, under the mask's names (`unet.` before them), and the rest.

    Raises:
        InputError: it is for another model.
    """
    parts: list[dict[str, Any]] = [{}, {}]
    for name, module in weights.modules.items():
        component = name.replace(":", ".").split(".")[0]
        if component != "unet" and not component.startswith("text_encoder"):
            raise InputError(
                f"{weights.source}: adapts a {component}; it is for another model than the mask"
            )
        parts[component != "unet"][name] = module
    ours, rest = (replace(weights, modules=part) for part in parts)
    shapes = {
        f"unet.{name.removesuffix('.weight')}": entry.shape
        for name, entry in mask.tensors.items()
        if name.endswith(".weight") and len(entry.shape) > 1
    }
    return ours.resolve(shapes) if ours.modules else ours, rest


def _folder(path: Path, mask: FreezeMask) -> Model:
    model = Model(str(path))
    for folder, kind in ((path / "unet", ""), (path, ""), (path / "unet_ema", "ema")):
        files = _variants(folder)
        if not files or (kind in model.copies):
            continue
        main = "" if "" in files else min(files)
        for variant, found in files.items():
            label = kind if variant == main else f"{kind} {variant}".strip()
            model.copies[label] = _under_names([open_source(f) for f in found], mask, str(folder))
    if (
        any((path / name).is_file() for name in (*DIFFUSERS_WEIGHTS, PEFT_CONFIG))
        or not model.copies
    ):
        model.adapters.append(_adapter(path))
    if files := _variants(path / "text_encoder"):
        sources = [open_source(f) for f in files["" if "" in files else min(files)]]
        model.text = _text(sources, ("",), str(path))
    return model


def _file(path: Path, mask: FreezeMask) -> Model:
    source = open_source(path)
    if not _names(source.shapes, mask):
        return Model(str(path), adapters=[_adapter(path)])
    model = Model(str(path), {"": _under_names([source], mask, str(path))})
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


def _adapter(path: Path) -> LoraFile:
    try:
        return open_lora(path)
    except InputError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: holds no UNet in diffusers' or the original layout, and no adapter: {why}"
        ) from error


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


def _under_names(sources: list[Source], mask: FreezeMask, where: str) -> Weights:
    own = {key: source for source in sources for key in source.shapes}
    places = {name: (own[key], key) for name, key in _names(own, mask).items()}
    return Weights(where, places, {name: entry.shape for name, entry in mask.tensors.items()})


def _names(keys: Iterable[str], mask: FreezeMask) -> dict[str, str]:
    """{name of the UNet's parameter in diffusers: key}, or {} if there is no UNet among the keys."""
    keys = set(keys)
    for prefix in _LDM:
        if f"{prefix}input_blocks.0.0.weight" in keys:
            return _original(keys, prefix, mask)
    for prefix in _WRAPPERS:
        if any(f"{prefix}{name}" in keys for name in mask.tensors):
            break
    else:
        return {}
    if adapter := next((key for key in keys if ".lora_" in key), None):
        raise InputError(
            f"{adapter}: is a LoRA layer among the weights of a UNet; save the adapter as a file of its own "
            "and verify both"
        )
    return {
        key.removeprefix(prefix).replace(".base_layer.", "."): key
        for key in keys
        if key.startswith(prefix)
    }


def _original(keys: Iterable[str], prefix: str, mask: FreezeMask) -> dict[str, str]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    resnets = [re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name) for name in mask.tensors]
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
    return Weights(where, places) if places else None


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix's shape without the kernel of one pixel."""
    return shape[:2] if len(shape) == 4 and math.prod(shape[2:]) == 1 else shape
