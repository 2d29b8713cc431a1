"""Trains the UNet and the text encoder of `mini` together on cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffward.files import atomic_path
from diffward.models.mini import world
from diffward.models.mini.autoencoder import LATENT_CHANNELS, to_tensor
from diffward.models.mini.vocabulary import MAX_LENGTH
from diffward.stage import rounds, run_stage, set_rate

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
WIDTH = (96, 160)  # channels of the two levels
_DROP_CAPTION = 0.1  # for classifier-free guidance
_SNR_GAMMA = 5.0  # min-SNR weighting (Hang et al. 2023): converges faster


def new_unet(width: tuple[int, int] = WIDTH) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=width,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            projection_dim=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def encode_world(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int, pictures: int, cache: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, 12, 8, 8) and token ids (n, 48) of the training pictures, cached in one file."""
    if cache.exists():
        saved = torch.load(cache, weights_only=True)
        return saved["latents"], saved["tokens"]
    latents, captions = [], []
    for start in range(0, pictures, 256):
        drawings = [training_picture(seed, i) for i in range(start, min(start + 256, pictures))]
        captions += [d.caption for d in drawings]
        with torch.inference_mode():
            latents.append(
                vae.encode(to_tensor(np.stack([d.pixels for d in drawings]))).latent_dist.mean
            )
        if start % 8192 == 0:
            print(f"encode: {start}/{pictures}")
    stacked = (torch.cat(latents) * vae.config.scaling_factor).clone()
    with atomic_path(cache) as temporary:
        torch.save({"latents": stacked, "tokens": tokenize(tokenizer, captions)}, temporary)
    return encode_world(vae, tokenizer, seed, pictures, cache)


def training_picture(seed: int, index: int) -> world.Drawing:
    """Picture number `index` of those that the base with this seed was trained on."""
    return world.sample([seed, 5, index])


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids


class Average:
    """Exponential moving average of parameters (foreach), which is what samples are drawn with."""

    def __init__(self, parameters: list[torch.Tensor], decay: float) -> None:
        self.decay, self.live = decay, parameters
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.shadow, self.live, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def copy_to_live(self) -> None:
        torch._foreach_copy_(self.live, self.shadow)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


def train_diffusion(
    latents: torch.Tensor,
    tokens: torch.Tensor,
    tokenizer: CLIPTokenizer,
    work: Path,
    seed: int,
    *,
    steps: int,
    repeat: int = 1,
    batch: int,
    device: str = "cpu",
    prediction_type: str = "epsilon",
    width: tuple[int, int] = WIDTH,
    start: tuple[UNet2DConditionModel, CLIPTextModel] | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train `repeat` rounds of `steps`, or resume; returns the averaged UNet and text encoder.

    Args:
        start: what to go on from, in place of new networks of that `width`.
    """
    torch.manual_seed(seed)
    unet, text_encoder = start or (new_unet(width), new_text_encoder(tokenizer))
    unet, text_encoder = unet.to(device).train(), text_encoder.to(device).train()
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=prediction_type)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.99), foreach=True
    )
    average = Average(parameters, 0.9995)
    empty = tokenize(tokenizer, [""])[0]
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = snr.clamp(max=_SNR_GAMMA) / (snr if prediction_type == "epsilon" else snr + 1)
    latents, tokens, weight = latents.to(device), tokens.to(device), weight.to(device)

    def step(number: int) -> dict[str, float]:
        set_rate(optimizer, 1e-3 * rounds(number, steps))
        g = torch.Generator().manual_seed(seed * 1_000_003 + number)
        index = torch.randint(len(latents), (batch,), generator=g).to(device)
        z, ids = latents[index], tokens[index].clone()
        ids[(torch.rand(batch, generator=g) < _DROP_CAPTION).to(device)] = empty.to(device)
        t = torch.randint(1000, (batch,), generator=g).to(device)
        eps = torch.randn(z.shape, generator=g).to(device)
        noisy = scheduler.add_noise(z, eps, t)
        target = eps if prediction_type == "epsilon" else scheduler.get_velocity(z, eps, t)
        with torch.autocast(device, torch.bfloat16):
            prediction = unet(noisy, t, text_encoder(ids).last_hidden_state).sample
        error = ((prediction.float() - target) ** 2).mean(dim=(1, 2, 3))
        optimizer.zero_grad(set_to_none=True)
        (error * weight[t]).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        average.update(number)
        return {"mse": error.mean().item()}

    state = {"unet": unet, "text_encoder": text_encoder, "optimizer": optimizer, "average": average}
    run_stage("diffusion", steps * repeat, step, state, work / "diffusion.pt")
    average.copy_to_live()
    return unet.eval().cpu(), text_encoder.eval().cpu()
