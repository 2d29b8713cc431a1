"""Models and adapters on disk, opened to be read a tensor at a time under diffusers' names of the UNet."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffward.errors import InputError
from diffward.lora import LoraFile, LoraWeights, open_lora
from diffward.lora.file import DIFFUSERS_WEIGHTS, PEFT_CONFIG
from diffward.models.load import EMBEDDED
from diffward.models.saved import Saved, Weights, open_saved

if TYPE_CHECKING:
    from diffward.guard.mask import FreezeMask

__all__ = ["Model", "Weights", "open_model", "split_adapter"]


@dataclass
class Model(Saved):
    """What was found at a path; no copies of a UNet for an adapter alone.

    Attributes:
        adapters: LoRAs.
    """

    adapters: list[LoraFile] = field(default_factory=list)


def open_model(path: str | Path, mask: FreezeMask) -> Model:
    """Open a diffusers pipeline or UNet folder, a file of either layout, or a LoRA; headers are read, no tensor.

    Raises:
        InputError: nothing there, damaged, none of these, or the UNet of another model than the mask's.
    """
    from diffward.models.mini import PIPELINE

    place = PIPELINE if str(path) == EMBEDDED else Path(path)
    if not place.exists():
        raise InputError(
            f"{path}: no such file or folder; give a model or a LoRA that is on this machine"
        )
    saved = open_saved(place, {name: entry.shape for name, entry in mask.tensors.items()})
    model = Model(saved.where, saved.copies, saved.text)
    beside = any((place / name).is_file() for name in (*DIFFUSERS_WEIGHTS, PEFT_CONFIG))
    if beside or not model.copies:
        model.adapters.append(_adapter(place))
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


def _adapter(path: Path) -> LoraFile:
    try:
        return open_lora(path)
    except InputError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise InputError(
            f"{path}: holds no UNet in diffusers' or the original layout, and no adapter: {why}"
        ) from error
