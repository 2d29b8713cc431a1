"""Tiny models and random factors for the tests of this room."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

SHARED = Path(__file__).parents[3] / "shared" / "data" / "lora"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def factors(out: int, inner: int, rank: int, seed: int, kernel: int | None = None, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    extra = () if kernel is None else (kernel, kernel)
    ones = () if kernel is None else (1, 1)
    down = torch.randn(rank, inner, *extra, generator=generator)
    up = torch.randn(out, rank, *ones, generator=generator)
    dtype = dtype or torch.float32
    return down.to(dtype), up.to(dtype)


TARGETS = {
    # canonical name: (out, in, rank, kernel, alpha)
    f"unet.{BLOCK}.attn1.to_q": (8, 8, 2, None, 1.0),
    f"unet.{BLOCK}.attn2.to_k": (8, 768, 2, None, 1.0),
    f"unet.{BLOCK}.attn2.to_out.0": (8, 8, 3, None, 0.7),
    f"unet.{BLOCK}.ff.net.0.proj": (64, 8, 2, None, 1.0),
    "unet.down_blocks.0.resnets.0.conv1": (8, 8, 2, 3, 3.0),
    "unet.mid_block.attentions.0.proj_in": (8, 8, 2, 1, 1.0),
    "unet.up_blocks.1.upsamplers.0.conv": (8, 8, 2, 3, 1.0),
    "text_encoder.encoder.layers.0.self_attn.q_proj": (768, 768, 2, None, 1.0),
    "text_encoder.encoder.layers.0.mlp.fc1": (16, 768, 2, None, 4.0),
}


def tiny_unet(cross: int = 16):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
    ).eval()


def tiny_text(width: int = 16):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def tiny_pipeline():
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny_text(),
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def shapes_of(component: str, model) -> dict[str, tuple[int, ...]]:
    """{full name: weight shape} of every linear and convolution."""
    return {
        f"{component}.{name}": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
