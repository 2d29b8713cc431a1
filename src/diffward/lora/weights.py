"""LoRA weights in memory, and matching them to the modules of a base model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from diffward.errors import InputError
from diffward.lora.module import LoraModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffward.lora.file import LoraFile


@dataclass
class LoraWeights:
    """Modules by canonical name, in the order of the file; `extras` are bundled embeddings."""

    modules: dict[str, LoraModule]
    extras: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    base_family: str = "unknown"
    source: str = ""

    @property
    def components(self) -> list[str]:
        """`unet`, `text_encoder`, … in the order in which they first appear."""
        return list(dict.fromkeys(name.replace(":", ".").split(".")[0] for name in self.modules))

    @property
    def is_positional(self) -> bool:
        """Whether modules are still numbered instead of named."""
        return any(":" in name for name in self.modules)

    def resolve(self, module_shapes: dict[str, tuple[int, ...]]) -> LoraWeights:
        """The same weights under the names of a base model, shapes checked.

        `module_shapes`: {full module name with component prefix: weight shape} of every linear and
        convolution of the base. Raises `InputError` when shapes disagree (saying which base the file
        looks like) or when a module of the file is not in the base.
        """
        from diffward.lora.resolve import resolve

        return resolve(self, module_shapes)


def load_weights(file: LoraFile, dtype: torch.dtype | str | None = "float32") -> LoraWeights:
    """Read all tensors of an opened LoRA in `dtype` (None: the file's own)."""
    import torch

    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    assert dtype is None or isinstance(dtype, torch.dtype)

    def read(source, key: str) -> Tensor:
        tensor = source.tensor(key)
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            raise InputError(f"{source.path}: tensor {key!r} holds NaN or infinity")
        return tensor if dtype is None else tensor.to(dtype)

    modules = {}
    for name, entry in file.entries.items():
        tensors = {role: read(entry.source, key) for role, key in entry.factors.items()}
        modules[name] = LoraModule(
            name,
            entry.kind,
            tensors,
            entry.alpha(),
            entry.rank,
            scale_override=entry.scale_override(),
        )
    if not modules and file.kind == "textual_inversion":
        raise InputError(
            f"{file.path}: is a textual-inversion embedding, not a LoRA; inspect reads it, "
            "other commands need a LoRA"
        )
    extras = {name: read(source, key) for name, (source, key) in file.extras.items()}
    return LoraWeights(modules, extras, dict(file.metadata), file.base_family, str(file.path))


def renamed(module: LoraModule, name: str, shape: tuple[int, ...] | None) -> LoraModule:
    return replace(module, name=name, shape=shape)
