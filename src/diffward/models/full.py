"""A fully fine-tuned model on disk: told from a LoRA by its tensors, and read for the base it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from diffward.errors import InputError
from diffward.files import sha256_file
from diffward.lora.family import family_of_width
from diffward.lora.file import DIFFUSERS_WEIGHTS, PEFT_CONFIG
from diffward.lora.source import open_source
from diffward.models.saved import Weights, holds_unet, main_files, open_saved

if TYPE_CHECKING:
    from diffward.models.adapters import SwappedWeights
    from diffward.models.denoiser import Denoiser


@dataclass(frozen=True)
class FullModel:
    """A diffusers pipeline or UNet folder, or a checkpoint in one file.

    Attributes:
        files: of the UNet, then of the text encoder (where the folder has one), as loaders take them.
        base_family: told by the width of the cross-attention.
        metadata: header of a checkpoint in one safetensors file; of other kinds {}.
        prediction_type: as a folder's scheduler has it; None where nothing tells.
    """

    path: Path
    files: tuple[Path, ...]
    base_family: str
    metadata: Mapping[str, str]
    prediction_type: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Of the file; of the hashes of all files where there is more than one."""
        told = [sha256_file(file) for file in self.files]
        return told[0] if len(told) == 1 else hashlib.sha256("\n".join(told).encode()).hexdigest()

    def weights(self, components: Mapping[str, nn.Module]) -> Weights:
        """Its tensors by full name (`unet.conv_in.weight`), none read yet; no text encoder if none is known in it.

        Args:
            components: the base's `unet` and `text_encoder`.
        """
        shapes = {
            f"{prefix}.{name}": tuple(parameter.shape)
            for prefix, component in components.items()
            for name, parameter in component.named_parameters()
        }
        unet = {n.removeprefix("unet."): s for n, s in shapes.items() if n.startswith("unet.")}
        saved = open_saved(self.path, unet)
        places = {f"unet.{name}": place for name, place in saved.unet.places.items()}
        thirds = {}
        text = saved.text or Weights(str(self.path), {})
        for name in shapes:
            # Versions of transformers differ in whether a level `text_model` is in the names.
            bare = name.removeprefix("text_encoder.").removeprefix("text_model.")
            if name.startswith("text_encoder.") and bare in text.places:
                places[name] = text.places[bare]
                if bare in text.thirds:
                    thirds[name] = text.thirds[bare]
        return Weights(str(self.path), places, shapes, thirds)

    def attach(self, denoiser: Denoiser) -> SwappedWeights:
        """Put it on its base.

        Raises:
            InputError: damaged, not finite, of another architecture or prediction type, or the base itself.
        """
        if self.prediction_type not in (None, denoiser.prediction_type):
            raise InputError(
                f"{self.path}: predicts {self.prediction_type}, base {denoiser.name} {denoiser.prediction_type}; "
                "give the base that it was fine-tuned from"
            )
        return denoiser.attach_model(self.weights(denoiser.components()), str(self.path))


def find_full(path: str | Path) -> FullModel | None:
    """The full model at a path, or None where there is something else: a LoRA, or nothing. Reads headers only.

    Raises:
        InputError: a file is damaged, or the model lies in the folder `pipeline` within.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        return None
    source = open_source(path)
    if not holds_unet(source.shapes):
        return None
    return FullModel(path, (path,), _family(source.shapes), source.metadata)


def _in_folder(path: Path) -> FullModel | None:
    if any((path / name).is_file() for name in (*DIFFUSERS_WEIGHTS, PEFT_CONFIG)):
        return None
    files = main_files(path / "unet") or main_files(path)
    shapes = {key: shape for file in files for key, shape in open_source(file).shapes.items()}
    if holds_unet(shapes):
        files = [*files, *main_files(path / "text_encoder")]
        return FullModel(path, tuple(files), _family(shapes), {}, _prediction(path))
    if (path / "pipeline" / "model_index.json").is_file():
        raise InputError(f"{path}: the model lies in its folder pipeline; give {path / 'pipeline'}")
    return None


def _family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    widths = (s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight") and len(s) > 1)
    width = next(widths, None)
    return family_of_width(width) if width else "unknown"


def _prediction(folder: Path) -> str | None:
    try:
        told = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        return str(told["prediction_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
