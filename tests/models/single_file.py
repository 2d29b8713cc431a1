"""A pipeline as one checkpoint under the names of the original Stable Diffusion (LDM)."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def ldm_checkpoint(pipe: Any) -> dict[str, Tensor]:
    tensors = {}
    for key, value in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet(key, pipe.unet.config)}"] = value
    blocks = len(pipe.vae.config.block_out_channels)
    for key, value in pipe.vae.state_dict().items():
        name = _vae(key, blocks)
        linear = ".attn_1." in name and value.ndim == 2
        tensors[f"first_stage_model.{name}"] = value[:, :, None, None] if linear else value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = (
            value
        )
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def _unet(key: str, config: Any) -> str:
    stem, _, leaf = key.rpartition(".")
    if stem in _UNET:
        return f"{_UNET[stem]}.{leaf}"
    layers = config.layers_per_block + 1
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        slot = 2 * int(match[2]) if match[1] == "resnets" else 1
        return f"middle_block.{slot}.{_resnet(match[3]) if match[1] == 'resnets' else match[3]}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key)
    assert match, key
    side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    place = block * layers + layer + (1 if side == "down" else 0)
    stem = f"{'input' if side == 'down' else 'output'}_blocks"
    if kind == "resnets":
        return f"{stem}.{place}.0.{_resnet(rest)}"
    if kind == "attentions":
        return f"{stem}.{place}.1.{rest}"
    if kind == "downsamplers":
        return f"{stem}.{block * layers + layers}.0.{rest.replace('conv', 'op')}"
    slot = 2 if "CrossAttn" in config.up_block_types[block] else 1
    return f"{stem}.{block * layers + layers - 1}.{slot}.{rest}"


def _resnet(rest: str) -> str:
    stem, _, leaf = rest.rpartition(".")
    return f"{_RESNET[stem]}.{leaf}"


def _vae(key: str, blocks: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if match := re.match(r"(.+)mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        return f"{match[1]}mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key
    )
