"""A tiny base with a mask, and ways to change and save it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffward.guard import FreezeMask

Q, CONV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"
FREE = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_frozen(name: str) -> bool:
    """Down and middle blocks, and one bias that stands alone."""
    return name.startswith(("down_blocks.", "mid_block.")) or name == "conv_in.bias"


def mask_of(unet: Any) -> FreezeMask:
    weights = dict(unet.named_parameters())
    return FreezeMask.of(
        weights,
        [is_frozen(n) for n in weights],
        torch.linspace(0, 1, len(weights)),
        {"method": "x"},
    )


def edited(folder: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a pipeline folder whose UNet's tensors went through `edit`."""
    import shutil

    shutil.copytree(folder, out)
    tensors = load_file(out / "unet" / WEIGHTS)
    edit(tensors)
    save_file(tensors, out / "unet" / WEIGHTS)
    return out


def lora_file(
    path: Path, modules: dict[str, tuple[int, ...]], rank: int = 2, form: Any = "diffusers"
) -> Path:
    """A LoRA with random factors on modules {canonical name: weight shape}."""
    from diffward.lora import LoraModule, LoraWeights, write_lora

    g = torch.Generator().manual_seed(5)
    made = {
        name: LoraModule.of(
            name, torch.randn(rank, *shape[1:], generator=g),
            torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=g), float(rank),
        )
        for name, shape in modules.items()
    }  # fmt: skip
    write_lora(LoraWeights(made), path, form)
    return path
