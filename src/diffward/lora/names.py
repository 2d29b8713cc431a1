"""Module names: canonical diffusers paths, kohya's flattened names, and LDM block names.

Canonical is `component.dotted.path` as the modules are called in diffusers and transformers, with
the `text_model.` level of CLIP left out (today's `CLIPTextModel` has none, older ones have).
"""

from __future__ import annotations

import re

# Every module name of diffusers/transformers/BFL that contains an underscore. kohya joins path
# segments with underscores; the longest known word wins when taking them apart again.
_WORD_LIST = """
down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks to_q to_k to_v to_out
to_add_out add_q_proj add_k_proj add_v_proj proj_in proj_out proj_mlp conv_in conv_out conv_shortcut
time_emb_proj time_embedding time_proj add_embedding linear_1 linear_2 linear_3 ff_context
norm1_context norm_out context_embedder x_embedder time_text_embed timestep_embedder
guidance_embedder text_embedder time_embed text_model self_attn q_proj k_proj v_proj out_proj
text_projection token_embedding position_embedding layer_norm1 layer_norm2 final_layer_norm
conv_norm_out double_blocks single_blocks joint_blocks context_block x_block img_attn txt_attn
img_mlp txt_mlp img_mod txt_mod img_in txt_in time_in vector_in guidance_in final_layer
adaLN_modulation input_blocks middle_block output_blocks label_emb in_layers out_layers emb_layers
skip_connection encoder_hid_proj class_embedding to_qkv to_added_qkv
"""
_SPLIT = {tuple(word.split("_")): word for word in _WORD_LIST.split()}
_LONGEST = max(map(len, _SPLIT))

_KOHYA_PREFIX = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lycoris_": "unet",
}
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")


def unflatten(flat: str) -> str:
    """`down_blocks_0_attentions_0_proj_in` → `down_blocks.0.attentions.0.proj_in`."""
    tokens = flat.split("_")
    parts: list[str] = []
    at = 0
    while at < len(tokens):
        for length in range(min(_LONGEST, len(tokens) - at), 1, -1):
            word = _SPLIT.get(tuple(tokens[at : at + length]))
            if word is not None:
                parts.append(word)
                at += length
                break
        else:
            parts.append(tokens[at])
            at += 1
    return ".".join(parts)


def split_component(name: str) -> tuple[str, str]:
    """`unet.conv_in` → (`unet`, `conv_in`)."""
    component, _, rest = name.partition(".")
    return component, rest


def without_text_model(path: str) -> str:
    return path.removeprefix("text_model.")


def from_kohya(name: str) -> str | None:
    """Canonical name of a kohya module (`lora_unet_…`), or None if the prefix is not kohya's."""
    for prefix, component in _KOHYA_PREFIX.items():
        if name.startswith(prefix):
            path = name[len(prefix) :]
            if component.startswith("text_encoder"):
                return f"{component}.{without_text_model(unflatten(path))}"
            path = unflatten(path)
            if component == "unet":
                path = from_ldm(path)
                if path.startswith(("double_blocks.", "single_blocks.", "joint_blocks.")):
                    component = "transformer"
            return f"{component}.{path}"
    return None


def to_kohya(name: str, *, two_text_encoders: bool) -> str | None:
    """kohya's name of a canonical module, or None if it would not come back the same."""
    component, path = split_component(name)
    flat = path.replace(".", "_")
    if component == "unet":
        result = f"lora_unet_{flat}"
    elif component == "transformer":
        result = f"lora_transformer_{flat}"
    elif component in ("text_encoder", "text_encoder_2"):
        number = ("1" if component == "text_encoder" else "2") if two_text_encoders else ""
        level = "" if path.startswith("text_projection") else "text_model_"
        result = f"lora_te{number}_{level}{flat}"
    else:
        return None
    return result if from_kohya(result) == name else None


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_LDM_FIXED = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_LDM = re.compile(r"^(input_blocks|output_blocks)\.(\d+)\.(\d+)(?:\.(.+))?$")


def from_ldm(path: str, layers_per_block: int = 2) -> str:
    """`input_blocks.1.1.proj_in` (LDM, SGM) → `down_blocks.0.attentions.0.proj_in`.

    Paths that are not LDM's come back unchanged. Every Stable Diffusion UNet has two layers a block.
    """
    if path in _LDM_FIXED:
        return _LDM_FIXED[path]
    if path.startswith("middle_block."):
        _, slot, rest = (*path.split(".", 2), "")[:3]
        kind = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}.get(slot, slot)
        return f"mid_block.{kind}.{_RESNET.get(rest, rest)}".rstrip(".")
    match = _LDM.match(path)
    if not match:
        return path
    side, index, inner, rest = match[1], int(match[2]), int(match[3]), match[4] or ""
    if side == "input_blocks":
        block, layer = divmod(index - 1, layers_per_block + 1)
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        stem = f"down_blocks.{block}"
    else:
        block, layer = divmod(index, layers_per_block + 1)
        # A block without attention keeps its upsampler in slot 1, one with attention in slot 2.
        if rest == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
        stem = f"up_blocks.{block}"
    if inner == 0:
        return f"{stem}.resnets.{layer}.{_RESNET.get(rest, rest)}".rstrip(".")
    return f"{stem}.attentions.{layer}.{rest}".rstrip(".")


_OLD_ATTENTION = re.compile(r"\.processor\.to_(q|k|v|out)$|\.to_(q|k|v|out)$")
_TEXT_PATH = re.compile(r"(?:^|\.)(self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])$")


def from_diffusers(path: str) -> str:
    """Canonical name of a module in diffusers' layout, old attention processors included."""
    component, rest = split_component(path)
    if component not in COMPONENTS:
        component, rest = "unet", path
    rest = rest.replace(".processor.", ".")
    if component.startswith("text_encoder"):
        rest = without_text_model(rest)
        rest = re.sub(
            r"self_attn\.to_(q|k|v|out)$", lambda match: f"self_attn.{match[1]}_proj", rest
        )
    elif re.search(r"attn\d?\.to_out$", rest):
        rest += ".0"
    return f"{component}.{rest}"


def from_comfyui(path: str) -> str:
    """Canonical name of a ComfyUI module: `diffusion_model.…`, `text_encoders.clip_l.…`."""
    if path.startswith("diffusion_model."):
        rest = from_ldm(path.removeprefix("diffusion_model."))
        unet = rest.startswith(
            ("down_blocks.", "up_blocks.", "mid_block.", "conv_", "time_embedding", "add_embedding")
        )
        return f"{'unet' if unet else 'transformer'}.{rest}"
    rest = path.removeprefix("text_encoders.")
    for clip, component in (("clip_l.", "text_encoder"), ("clip_g.", "text_encoder_2")):
        if rest.startswith(clip):
            rest = rest.removeprefix(clip).removeprefix("transformer.")
            return f"{component}.{without_text_model(rest)}"
    return f"text_encoder_3.{rest}"


def from_peft(path: str, width: int | None = None, component: str | None = None) -> str:
    """Canonical name of a PEFT module; the component is told from the path where it is not given.

    `width` (of the text encoder) tells CLIP-G (1280), the second encoder of SDXL, from the first.
    """
    path = path.removeprefix("base_model.model.")
    if component is None:
        if _TEXT_PATH.search(path) or path == "text_projection":
            component = "text_encoder_2" if width == 1280 else "text_encoder"
        elif re.match(r"(single_)?transformer_blocks\.|joint_blocks\.|context_embedder", path):
            component = "transformer"
        else:
            component = "unet"
    return f"{component}.{without_text_model(path) if component.startswith('text') else path}"
