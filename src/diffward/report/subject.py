"""What an audit looks at: a LoRA, or a fully fine-tuned model, behind the same few verbs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffward.errors import InputError
from diffward.lora import Leak, inspect_lora, open_lora
from diffward.report.schema import FULL_MODEL

if TYPE_CHECKING:
    from diffward.lora import Inspection, LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.full import FullModel


class AuditedLora:
    """A LoRA file or folder of any layout."""

    absent: Mapping[str, str] = {}

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = open_lora(path)
        self.metadata: Mapping[str, str] = self.file.metadata
        self.notes: list[str] = []

    @cached_property
    def inspection(self) -> Inspection:
        return inspect_lora(self.path)

    @property
    def sha256(self) -> str:
        return self.file.sha256

    @property
    def leaks(self) -> list[Leak]:
        return self.inspection.leaks

    def facts(self) -> dict[str, Any]:
        """Keys of `schema.Subject`, and others."""
        return {**self.inspection.to_dict(), "sha256": self.inspection.sha256 or self.sha256}

    def attach(self, denoiser: Denoiser) -> Callable[[], LoraWeights]:
        """Put it on its base; gives what white-box probes need. Raises InputError if it is for another base."""
        weights = self.file.load()
        denoiser.attach(weights)
        return lambda: weights

    def exposure(self) -> dict[str, Any] | None:
        """See `exposure_of`."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return exposure_of([folder / "run.json"], "lora", self.metadata)


class AuditedModel:
    """A fully fine-tuned model: what it changed is known once it is attached."""

    def __init__(self, model: FullModel) -> None:
        self.path = model.path
        self.model = model
        self.metadata = model.metadata
        self.absent = {"shadows": "needs shadow LoRAs, and this is a full model"}
        self.notes = [
            f"{file.name} is a pickle, which may hold a trainer's state beside the weights: not looked at"
            for file in model.files
            if file.suffix != ".safetensors"
        ]
        self._changed: tuple[int, int] | None = None

    @property
    def sha256(self) -> str:
        return self.model.sha256

    @cached_property
    def leaks(self) -> list[Leak]:
        from diffward.lora.leaks import model_leaks

        return model_leaks(self.path, self.metadata)

    def facts(self) -> dict[str, Any]:
        tensors, parameters = self._changed or (None, None)
        return {
            "path": str(self.path), "sha256": self.sha256, "format": FULL_MODEL, "folder": self.path.is_dir(),
            "base_family": self.model.base_family, "rank": None, "modules": tensors, "parameters": parameters,
        }  # fmt: skip

    def attach(self, denoiser: Denoiser) -> Callable[[], LoraWeights]:
        """As that of a LoRA; the factors are those of `change_factors`, computed when asked for.

        Raises:
            InputError: see `FullModel.attach`.
        """
        from diffward.membership.factors import change_factors

        swapped, shapes = self.model.attach(denoiser), denoiser.module_shapes()
        self._changed = len(swapped.changed), swapped.parameters
        matrices = {f"{name}.weight" for name in shapes if name.startswith("unet.")}
        if matrices.isdisjoint(swapped.changed):
            self.absent["factors"] = "needs a matrix of the UNet that is not the base's"
        if "text_encoder" not in swapped.given:
            self.notes.append("no text encoder was found in the model: the base's is used")
        return lambda: change_factors(swapped.changes(), shapes)

    def exposure(self) -> dict[str, Any] | None:
        places = [self.path, self.path.parent] if self.path.is_dir() else [self.path.parent]
        if (self.path.parent / "model_index.json").is_file():  # the UNet's folder within a pipeline
            places.append(self.path.parent.parent)
        return exposure_of([place / "run.json" for place in places], "full", self.metadata)


Audited = AuditedLora | AuditedModel


def open_audited(path: str | Path, *, shadows: int = 0) -> Audited:
    """What lies at a path; headers are read only.

    Raises:
        InputError: neither a LoRA nor a full model, damaged, or `shadows` are asked for with a full model.
    """
    from diffward.models.full import find_full

    model = find_full(path)
    if model is None:
        return AuditedLora(path)
    if shadows:
        raise InputError(
            f"--shadows {shadows}: shadows are LoRAs, and {path} is a full model; leave them out"
        )
    return AuditedModel(model)


def reads(path: str | Path) -> bool:
    """Whether a shipped inverter knows all modules of a LoRA: then it can be read without pictures."""
    from diffward.inversion.inverter import SHIPPED, facts_of
    from diffward.models.full import find_full

    if find_full(path) is not None:
        return False
    entries = open_lora(path).entries
    known = [facts for file in SHIPPED.glob("*.safetensors") if (facts := facts_of(file))]
    return any(
        entries
        and all(list(entry.shape) == facts.modules.get(name) for name, entry in entries.items())
        for facts in known
    )


def exposure_of(runs: list[Path], tune: str, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """{passes, steps, source}: how often training saw each picture, if something tells.

    Args:
        runs: where `run.json` of `diffward train` may lie, the first that is there counts.
        tune: what that run must have tuned, "lora" or "full".
        metadata: a header; kohya's trainers write it there.
    """
    for run in runs:
        try:
            told = json.loads(run.read_text(encoding="utf-8"))
            if told.get("settings", {}).get("tune", tune) != tune:
                continue
            passes, steps = float(told["passes_per_picture"]), int(told["steps"])
            return {"passes": passes, "steps": steps, "source": "run.json"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    try:
        steps = int(metadata["ss_steps"])
        batch = metadata.get("ss_total_batch_size") or metadata["ss_batch_size_per_device"]
        passes = steps * int(batch) / int(metadata["ss_num_train_images"])
        return {"passes": passes, "steps": steps, "source": "header"}
    except (KeyError, ValueError, ZeroDivisionError, TypeError):
        return None
