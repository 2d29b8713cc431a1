"""What a LoRA of a zoo costs: floating-point operations of a step against the public loop's, and seconds.

As read in the public code, each joint step encodes the instance picture and a class picture and makes a
forward and backward pass for each (prior preservation), then encodes a picture again and makes a forward and backward
pass through the UNet for the encoder. Ours: pictures are encoded once, no class pictures, and the encoder learns offline.
Counted on meta tensors, so no weights are needed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench._result import record


def run(quick: bool = False) -> None:
    cases = (("mini", 64), ("sd15 architecture", 256), ("sd15 architecture", 512))
    rows = [count(*case) for case in cases[: 1 if quick else 3]]
    if not quick:
        rows[2]["ratio_256"] = rows[2]["public_gflop"] / rows[1]["ours_gflop"]
    rows += quick_tier(3 if quick else 10)
    record("zoo-cost", rows, seeds=[0], quick=quick, notes=[
        "public_gflop, ours_gflop: of one joint step of one LoRA at batch 1; ratio: their quotient; ratio_256: against ours at 256 pixels, "
        "which the design recommends for zoos",
        "backward passes through the frozen base give no gradients of its weights",
        "quick tier: header, spectrum, who, words, how many, of one LoRA file of mini: the seconds of an audit without pictures, after imports",
    ])  # fmt: skip


def count(base: str, side: int) -> dict[str, Any]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    unet, vae = _models(base)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.device("meta"):
        latents = torch.empty(1, unet.config.in_channels, side // factor, side // factor)
        text = torch.empty(1, 77, unet.config.cross_attention_dim)
        pixels = torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        vae.encode(pixels)
    with FlopCounterMode(display=False) as step:
        unet(latents, torch.zeros(1, device="meta"), text).sample.sum().backward()
    encode, both = (counter.get_total_flops() / 1e9 for counter in (encoding, step))
    public, ours = 3 * encode + 3 * both, both
    return {"base": base, "pixels": side, "encode_gflop": encode, "step_gflop": both, "public_gflop": public, "ours_gflop": ours, "ratio": public / ours}  # fmt: skip


def _models(base: str) -> tuple[Any, Any]:
    """UNet with a LoRA on its attention, and autoencoder, without weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from peft import LoraConfig

    from bench.make_sd15 import new_pipeline
    from diffward.models.mini import PIPELINE

    with torch.device("meta"):
        if base == "mini":
            unet = UNet2DConditionModel.from_config(PIPELINE / "unet")
            vae = AutoencoderKL.from_config(PIPELINE / "vae")
        else:
            pipeline = new_pipeline()
            unet, vae = pipeline.unet, pipeline.vae
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet, vae


def quick_tier(repeats: int) -> list[dict[str, Any]]:
    """Seconds of what an audit asks of a file alone."""
    import tempfile
    from statistics import median

    from diffward.finetune import Settings
    from diffward.lora import open_lora, write_lora
    from diffward.models.load import load_base
    from diffward.report.audit import audit_lora

    denoiser = load_base("mini", device="cpu")
    weights = denoiser.inject(8, 8.0, Settings().target_modules(), text_encoder=False).weights()
    denoiser.detach()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "l.safetensors"
        write_lora(weights, file, "diffusers")
        for _ in range(repeats):
            began = time.monotonic()
            report, _ = audit_lora(denoiser, open_lora(file).path, None)
            seconds.append(time.monotonic() - began)
    asked = ", ".join(q["id"] for q in report["questions"])
    return [{"base": "mini", "what": f"quick tier ({asked})", "seconds": median(seconds)}]
