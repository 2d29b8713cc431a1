"""Files in every layout, made from one set of random factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffward.lora import LoraModule, LoraWeights

from .helpers import SHARED, TARGETS, factors


@pytest.fixture(scope="session")
def shared_lora() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the published LoRA files (../shared/data/lora) are not here")
    return SHARED


@pytest.fixture
def weights() -> LoraWeights:
    """Linear and convolution, UNet and text encoder, mixed ranks, alpha other than rank."""
    modules = {}
    for seed, (name, (out, inner, rank, kernel, alpha)) in enumerate(TARGETS.items()):
        modules[name] = LoraModule.of(name, *factors(out, inner, rank, seed, kernel), alpha)
    return LoraWeights(modules, base_family="sd1")


@pytest.fixture
def kohya_file(tmp_path, weights) -> Path:
    """Written by hand, not by the code under test."""
    tensors = {}
    for name, module in weights.modules.items():
        component, path = name.split(".", 1)
        flat = path.replace(".", "_")
        key = f"lora_unet_{flat}" if component == "unet" else f"lora_te_text_model_{flat}"
        tensors[f"{key}.lora_down.weight"] = module.tensors["down"]
        tensors[f"{key}.lora_up.weight"] = module.tensors["up"]
        tensors[f"{key}.alpha"] = torch.tensor(module.alpha)
    path = tmp_path / "kohya.safetensors"
    save_file(tensors, path, {"ss_network_dim": "2", "ss_output_name": "secret_project"})
    return path
