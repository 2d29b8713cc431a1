"""SD 1.5's layout at a tenth of its widths, random weights: 686 tensors, 8.6M parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

RESOLUTION = 64  # pixels
TENSORS, PARAMETERS = 686, 8_605_284


def small_denoiser(factor: int = 8, seed: int = 0) -> Denoiser:
    """SD 1.5's blocks at a tenth of their widths, random weights; the VAE shrinks by `factor`, 4 or 8."""
    import torch
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from bench.make_sd15 import _new_tokenizer
    from diffward.models.denoiser import Denoiser

    torch.manual_seed(seed)
    tokenizer, width = _new_tokenizer(), 64
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // factor,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=width,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    found = len(list(unet.parameters())), sum(p.numel() for p in unet.parameters())
    assert found == (TENSORS, PARAMETERS), f"{found[0]} tensors, {found[1]:,} parameters"
    channels = (20, 40, 80) if factor == 4 else (12, 24, 48, 48)
    vae = AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, projection_dim=width, intermediate_size=4 * width,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
            hidden_act="quick_gelu", bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return Denoiser(pipeline, "sd15 layout, a tenth of the widths", resolution=RESOLUTION)
