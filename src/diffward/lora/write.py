"""Writing LoRA weights in the layouts other tools load. Nothing about the data is ever written."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffward.errors import InputError
from diffward.files import atomic_path, write_text
from diffward.lora.family import base_family
from diffward.lora.module import LoraModule
from diffward.lora.names import split_component, to_kohya
from diffward.lora.peft_config import compact, component_config
from diffward.lora.policy import kept_value
from diffward.lora.weights import LoraWeights

if TYPE_CHECKING:
    from torch import Tensor

Format = Literal["diffusers", "peft", "kohya"]
_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def write_lora(
    weights: LoraWeights, path: str | Path, format: Format, metadata: dict[str, str] | None = None
) -> None:
    """Write `weights` to `path`, tensors as they are (no change of dtype), alpha exactly.

    `diffusers`: a file for `pipe.load_lora_weights`, alpha in `lora_adapter_metadata`.
    `kohya`: a file for A1111, ComfyUI and kohya's scripts, alpha beside every module. (diffusers
    0.42 reads such files too, but ignores alphas that differ from module to module.)
    `peft`: a folder with `adapter_config.json` and `adapter_model.safetensors`; with more than one
    component (UNet and text encoder) one subfolder each, named after the component.

    `metadata` goes through the whitelist of `scrub`. Raises `InputError` for what the layout cannot
    express (numbered modules, LoHa in diffusers, …); then nothing is written.
    """
    if weights.is_positional:
        raise InputError(
            f"{weights.source or 'this LoRA'}: its modules are numbered, not named; "
            "give the base it was made for (--base)"
        )
    if not weights.modules:
        raise InputError(f"{weights.source or 'this LoRA'}: has no modules to write")
    kept = {"format": "pt"}
    for key, value in (metadata or {}).items():
        clean = kept_value(key, value)
        if clean is not None and key != "lora_adapter_metadata":
            kept[key] = clean
    writer: dict[str, Callable[[LoraWeights, Path, dict[str, str]], None]] = {
        "diffusers": _write_diffusers,
        "peft": _write_peft,
        "kohya": _write_kohya,
    }
    if format not in writer:
        raise InputError(f"unknown LoRA layout {format!r}; known: {', '.join(writer)}")
    writer[format](weights, Path(path), kept)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name")
    with atomic_path(path) as temporary:
        _serialise(tensors, temporary, metadata)


def _serialise(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path, metadata)
    # safetensors writes the metadata in random order; the same weights shall give the same file.
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _by_component(weights: LoraWeights) -> dict[str, dict[str, LoraModule]]:
    result: dict[str, dict[str, LoraModule]] = {}
    for name, module in weights.modules.items():
        component, path = split_component(name)
        result.setdefault(component, {})[path.removeprefix("text_model.")] = module
    return result


def _no_extras(weights: LoraWeights, layout: str) -> None:
    if weights.extras:
        raise InputError(
            f"{weights.source or 'this LoRA'}: carries {len(weights.extras)} trained embeddings "
            f"({', '.join(list(weights.extras)[:3])}), for which the {layout} layout has no place; "
            "use kohya"
        )


def _write_diffusers(weights: LoraWeights, path: Path, metadata: dict[str, str]) -> None:
    _no_extras(weights, "diffusers")
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, Any] = {}
    for component, modules in _by_component(weights).items():
        for name, module in modules.items():
            if module.kind in ("loha", "lokr"):
                raise InputError(
                    f"{weights.source or 'this LoRA'}: module {module.name} is {module.kind}, which "
                    "pipe.load_lora_weights cannot read; use kohya or peft"
                )
            # Versions of transformers with and without that level both accept the key with it, and
            # both match the configuration without it.
            level = "text_model." if component.startswith("text_encoder") else ""
            level = "" if name.startswith("text_projection") else level
            for role, tensor in peft_tensors(module).items():
                # transformers wants the name of the parameter here, PEFT adds it itself.
                if component.startswith("text_encoder") and role == "lora_magnitude_vector":
                    role += ".weight"
                tensors[f"{component}.{level}{name}.{role}"] = tensor
        config = component_config(modules, weights.source)
        adapter.update({f"{component}.{key}": value for key, value in compact(config).items()})
    metadata["lora_adapter_metadata"] = json.dumps(adapter, indent=2, sort_keys=True)
    _save(tensors, path, metadata)


def _write_peft(weights: LoraWeights, path: Path, metadata: dict[str, str]) -> None:
    _no_extras(weights, "peft")
    if path.is_file():
        raise InputError(f"{path}: is a file; the peft layout is a folder")
    components = _by_component(weights)
    configs = {name: component_config(found, weights.source) for name, found in components.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        staged = Path(temporary)
        for component, modules in components.items():
            folder = staged if len(components) == 1 else staged / component
            folder.mkdir(exist_ok=True)
            tensors = {
                f"base_model.model.{_peft_path(component, name, module)}.{role}": tensor
                for name, module in modules.items()
                for role, tensor in peft_tensors(module).items()
            }
            _serialise(tensors, folder / "adapter_model.safetensors", metadata)
            config = json.dumps(configs[component], indent=2, sort_keys=True)
            write_text(folder / "adapter_config.json", config + "\n")
        for file in sorted(staged.rglob("*.*")):
            target = path / file.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(0o666 & ~_umask())
            file.replace(target)


def _peft_path(component: str, path: str, module: LoraModule) -> str:
    """PEFT needs the very names of the model; of transformers' encoders only the one with the
    projection (SDXL's second) still has a `text_model` level."""
    levelled = component == "text_encoder_2" or ".text_model." in module.name
    return f"text_model.{path}" if levelled and not path.startswith("text_projection") else path


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def peft_tensors(module: LoraModule) -> dict[str, Tensor]:
    """A module's tensors under PEFT's names. Raises `InputError` for what PEFT cannot express."""
    if "mid" in module.tensors:
        raise InputError(f"module {module.name}: a LoCon with a core tensor exists only in kohya")
    names = {"down": "lora_A.weight", "up": "lora_B.weight"}
    result = {}
    for role, tensor in module.tensors.items():
        if role in ("magnitude", "dora_scale"):
            if module.kind != "dora" or "down" not in module.tensors:
                raise InputError(f"module {module.name}: DoRA of this kind exists only in kohya")
            result["lora_magnitude_vector"] = _magnitude(module, tensor)
        else:
            result[names.get(role, role)] = tensor
    return result


def _magnitude(module: LoraModule, tensor: Tensor) -> Tensor:
    """PEFT's magnitude: (out,) for a linear layer, (1, out, 1, 1) for a convolution."""
    shape = module.weight_shape
    if "dora_scale" in module.tensors and tensor.shape[0] != shape[0]:
        raise InputError(
            f"module {module.name}: this DoRA scales the inputs, PEFT's scales the outputs; "
            "it exists only in kohya"
        )
    convolution = module.tensors["down"].ndim == 4
    return tensor.reshape((1, shape[0], 1, 1) if convolution else (shape[0],))


def _write_kohya(weights: LoraWeights, path: Path, metadata: dict[str, str]) -> None:
    import torch

    family = weights.base_family
    if family == "unknown":
        family = base_family({name: m.weight_shape for name, m in weights.modules.items()})
    two = any(name.startswith("text_encoder_2.") for name in weights.modules)
    two = two or family in ("sdxl", "sd3", "flux")
    tensors: dict[str, Tensor] = {}
    for name, module in weights.modules.items():
        canonical = name.replace(".text_model.", ".", 1) if name.startswith("text_") else name
        flat = to_kohya(canonical, two_text_encoders=two)
        if flat is None:
            raise InputError(f"module {name}: has no name in kohya's layout")
        factors = next(iter(module.tensors.values()))
        alpha = torch.tensor(module.effective_alpha, dtype=torch.float32)
        # In the precision of the factors where that is exact, as kohya writes it.
        if factors.is_floating_point() and alpha.to(factors.dtype).float() == alpha:
            alpha = alpha.to(factors.dtype)
        tensors[f"{flat}.alpha"] = alpha
        for role, tensor in module.tensors.items():
            if role == "magnitude":
                ones = (1,) * (module.tensors["down"].ndim - 1)
                tensors[f"{flat}.dora_scale"] = tensor.reshape(-1, *ones)
            else:
                ending = f"lora_{role}.weight" if role in ("down", "up", "mid") else role
                tensors[f"{flat}.{ending}"] = tensor
    for name, tensor in weights.extras.items():
        if name.startswith("<"):
            name = f"bundle_emb.{name.strip('<>')}.string_to_param.*"
            tensor = tensor.reshape(-1, tensor.shape[-1])
        tensors[name] = tensor
    plain = all(module.kind in ("lora", "locon", "dora") for module in weights.modules.values())
    metadata.setdefault("ss_network_module", "networks.lora" if plain else "lycoris.kohya")
    for key, values in (
        ("ss_network_dim", {str(module.rank) for module in weights.modules.values()}),
        ("ss_network_alpha", {str(m.effective_alpha) for m in weights.modules.values()}),
    ):
        metadata[key] = values.pop() if len(values) == 1 else "Dynamic"
    if family in _VERSIONS:
        metadata.setdefault("ss_base_model_version", _VERSIONS[family])
    _save(tensors, path, metadata)
