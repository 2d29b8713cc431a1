"""Finding a base: the embedded one, a diffusers folder, a single-file checkpoint, or a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffward.errors import InputError

CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# What the embedded base is called on the command line.
EMBEDDED = "mini"


def load_base(
    base: str | Path = EMBEDDED,
    *,
    device: str = "auto",
    precision: str = "auto",
    resolution: int | None = None,
    config: str | Path | None = None,
) -> Any:
    """Load a base model as a `Denoiser`.

    Args:
        base: "mini", a diffusers folder, a `.safetensors`/`.ckpt` checkpoint, or a hub id.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 on CUDA, fp32 elsewhere.
        resolution: side of the pictures in pixels; the model's own by default.
        config: diffusers folder that describes a single-file checkpoint, where the hub is out of
            reach.

    Raises:
        InputError: there is no such base, or it is not a Stable Diffusion 1.x or 2.x model.
    """
    import torch

    from diffward.models.denoiser import Denoiser

    _be_quiet()
    device = pick_device(device)
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"--precision {precision}: choose auto, fp32 or bf16")
    half = precision == "bf16" or (precision == "auto" and _has_bf16(device))
    pipeline = _load_pipeline(str(base), config)
    _check_kind(pipeline, str(base))
    dtype = torch.bfloat16 if half else torch.float32
    return Denoiser(pipeline, str(base), device=device, dtype=dtype, resolution=resolution)


def _has_bf16(device: str) -> bool:
    """Whether the device computes in bf16 itself; CPUs do not gain at these sizes."""
    import torch

    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def _be_quiet() -> None:
    """No notes on torchvision and no bars for loading parts: what matters is said by us."""
    import os
    import warnings

    # `torch_dtype` is what all supported versions of diffusers understand.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
    # Before transformers is first imported: it warns while it is being imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def pick_device(device: str) -> str:
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not available here; use auto or cpu") from error
    return device


def _load_pipeline(base: str, config: str | Path | None) -> Any:
    import torch

    path = Path(base)
    # fp32 for every part: a folder saved in half precision otherwise loads with mixed types.
    options: dict[str, Any] = {
        "torch_dtype": torch.float32,
        "safety_checker": None,
        "requires_safety_checker": False,
    }
    if base == EMBEDDED:
        from diffward.models.mini import PIPELINE

        return _from_folder(PIPELINE, options)
    if path.is_dir():
        return _from_folder(path, options)
    if path.is_file():
        return _from_checkpoint(path, config, options)
    if path.suffix in CHECKPOINTS or base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise InputError(
            f"base {base}: no such file or folder; give a diffusers folder, a checkpoint, a hub id or mini"
        )
    return _from_hub(base, options)


def _from_folder(folder: Path, options: dict[str, Any]) -> Any:
    from diffusers import StableDiffusionPipeline

    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"base {folder}: no model_index.json in it; give the folder of a diffusers pipeline"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise InputError(f"base {folder}: model_index.json is not readable as JSON") from error
    if kind not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise InputError(
            f"base {folder}: is a {kind}; supported are Stable Diffusion 1.x and 2.x pipelines"
        )
    try:
        return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        raise InputError(f"base {folder}: cannot be loaded ({_one_line(error)})") from error


def _from_checkpoint(path: Path, config: str | Path | None, options: dict[str, Any]) -> Any:
    from diffusers import StableDiffusionPipeline

    if path.suffix not in CHECKPOINTS:
        raise InputError(
            f"base {path}: not a checkpoint ({', '.join(CHECKPOINTS)}) and not a folder"
        )
    extra = {"config": str(config), "local_files_only": True} if config else {}
    try:
        # diffusers reads pickled checkpoints with weights_only=True.
        return StableDiffusionPipeline.from_single_file(str(path), **extra, **options)
    except Exception as error:
        hint = (
            ""
            if config
            else "; without a network, --base-config names a diffusers folder of the same family"
        )
        raise InputError(
            f"base {path}: cannot be loaded as a checkpoint ({_one_line(error)}){hint}"
        ) from error


def _from_hub(base: str, options: dict[str, Any]) -> Any:
    from diffusers import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_pretrained(base, **options)
    except OSError as error:
        raise InputError(
            f"base {base}: not in the local hub cache and the hub cannot be reached, or there is no such model; "
            "check the name and the network, or give a folder"
        ) from error
    except Exception as error:
        raise InputError(f"base {base}: cannot be loaded ({_one_line(error)})") from error


def _check_kind(pipeline: Any, base: str) -> None:
    unet = getattr(pipeline, "unet", None)
    if unet is None or pipeline.text_encoder is None or pipeline.tokenizer is None:
        raise InputError(f"base {base}: lacks a UNet, text encoder or tokenizer")
    if unet.config.addition_embed_type is not None:
        raise InputError(
            f"base {base}: is an SDXL model; supported are Stable Diffusion 1.x and 2.x"
        )
    if unet.config.in_channels != unet.config.out_channels:
        raise InputError(
            f"base {base}: is an inpainting or upscaling model ({unet.config.in_channels} input channels)"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 160 else text[:157] + "..."
