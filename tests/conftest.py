"""Tiny Stable Diffusion pipelines with random weights, and a few drawn pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from PIL import Image

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
CAPTIONS = ["a red cup", "a blue cup", "a red cup", "sks dog", "", "a green logo of a boat"]


def make_pipeline(prediction: str = "epsilon", seed: int = 0, **unet: Any) -> Any:
    """SD in miniature: PNDM and epsilon as in 1.5, or DDIM and v as in 2.1; 16 pixels, f = 2."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        "cup</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    merges = [("c", "u"), ("cu", "p</w>")]
    tokens.insert(-3, "cu")
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=12)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.3,
        )
        network = UNet2DConditionModel(
            **{
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "layers_per_block": 1,
                "block_out_channels": (8, 16),
                "norm_num_groups": 2,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
                **unet,
            }
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocab),
                hidden_size=16,
                projection_dim=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=12,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        )
        # The tiny encoder starts so close to zero that captions would make no difference.
        for parameter in text_encoder.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(8)
    kind: Any = PNDMScheduler if prediction == "epsilon" else DDIMScheduler
    extra = {"skip_prk_steps": True} if prediction == "epsilon" else {"clip_sample": False}
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=network.eval(),
        scheduler=kind(**SCHEDULE, set_alpha_to_one=False, prediction_type=prediction, **extra),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("DIFFWARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_pipeline() -> Callable[..., Any]:
    return make_pipeline


@pytest.fixture(scope="session")
def tiny_denoiser() -> Callable[..., Any]:
    """`tiny_denoiser("v_prediction", seed=1)`: a fresh denoiser over a tiny pipeline."""

    def make(prediction: str = "epsilon", seed: int = 0, **options: Any) -> Any:
        from diffward.models.denoiser import Denoiser

        return Denoiser(make_pipeline(prediction, seed), "tiny", **options)

    return make


@pytest.fixture
def denoiser(tiny_denoiser: Callable[..., Any]) -> Any:
    return tiny_denoiser()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The epsilon pipeline as a diffusers folder. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn pictures, not square, with captions (one of them twice, one empty)."""
    folder = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        corners = rng.integers(0, 256, (3, 2, 3)).astype(np.uint8)
        image = Image.fromarray(corners).resize((24, 20), Image.Resampling.BILINEAR)
        name = f"{index}.png"
        image.save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def pictures(picture_folder: Path) -> Any:
    from diffward.data import load_pictures

    return load_pictures(picture_folder)
