"""What may stand in a header: a whitelist of keys, each with the form its value must have.

`scrub` keeps what is listed here and nothing else; `inspect` reports what is not. A value that does
not have the form of its key (a path in the place of a number) is not kept either.
"""

from __future__ import annotations

import json
import re
from typing import Any

_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|None|True|False|"
_NUMBERS = rf"(?:{_NUMBER}|\[[\d., eE-]*\])"
_WORD = r"[A-Za-z][\w.+-]{0,40}|None|"
_HASH = r"(?:0x)?[0-9a-fA-F]{8,64}"
_RESOLUTION = r"\(?\d{2,5}(?:\s?[,x]\s?\d{2,5})?\)?|None"

_SETTINGS = (
    "learning_rate unet_lr text_encoder_lr min_snr_gamma noise_offset ip_noise_gamma "
    "adaptive_noise_scale multires_noise_iterations multires_noise_discount "
    "zero_terminal_snr debiased_estimation huber_c prior_loss_weight max_grad_norm "
    "clip_skip max_token_length full_fp16 full_bf16 fp8_base fp8_base_unet "
    "gradient_checkpointing lowram guidance_scale discrete_flow_shift sigmoid_scale "
    "v_parameterization masked_loss t5xxl_max_token_length apply_t5_attn_mask"
)

KEEP: dict[str, str] = {
    "format": r"pt|np|tf|flax|mlx",
    # The network: what a loader needs to know.
    "ss_network_module": r"[A-Za-z][\w.]{0,60}",
    "ss_network_dim": rf"{_NUMBER}|Dynamic",
    "ss_network_alpha": rf"{_NUMBER}|Dynamic",
    "ss_network_dropout": _NUMBER,
    "ss_scale_weight_norms": _NUMBER,
    # The base model.
    "ss_base_model_version": r"[A-Za-z0-9][\w.-]{0,40}",
    "ss_v2": r"True|False",
    "ss_sd_model_hash": _HASH,
    "ss_new_sd_model_hash": _HASH,
    "ss_vae_hash": _HASH,
    "ss_new_vae_hash": _HASH,
    "sshs_model_hash": _HASH,
    "sshs_legacy_hash": _HASH,
    # How it was trained, as far as that tells nothing of how much data there was.
    "ss_resolution": _RESOLUTION,
    "ss_optimizer": r"[A-Za-z][\w.]{0,80}(?:\([\w=., ()\[\]+-]{0,160}\))?",
    "ss_lr_scheduler": _WORD,
    "ss_mixed_precision": _WORD,
    "ss_loss_type": _WORD,
    "ss_huber_schedule": _WORD,
    "ss_timestep_sampling": _WORD,
    "ss_weighting_scheme": _WORD,
    "ss_model_prediction_type": _WORD,
    **{f"ss_{name}": _NUMBERS for name in _SETTINGS.split()},
    # What was done for privacy, and what it guarantees: nothing of whom it protects.
    "ss_privacy_method": r"[a-z][a-z-]{0,40}",
    "ss_privacy_weight": _NUMBER,
    "ss_privacy_target_auc": _NUMBER,
    "ss_privacy_epsilon": _NUMBER,
    "ss_privacy_delta": _NUMBER,
    "ss_privacy_unit": r"record, add/remove",
    "ss_privacy_accountant": r"prv|rdp",
    "ss_privacy_clip": _NUMBER,
    "modelspec.sai_model_spec": r"\d+(?:\.\d+){0,3}",
    "modelspec.architecture": r"[A-Za-z0-9][\w.-]{0,60}(?:/[a-z-]{2,20})?",
    "modelspec.implementation": (
        r"diffusers|sgm|https://github\.com/(?:Stability-AI|huggingface|black-forest-labs|CompVis)"
        r"/[\w.-]{1,60}"
    ),
    "modelspec.prediction_type": _WORD,
    "modelspec.resolution": _RESOLUTION,
    "modelspec.encoder_layer": r"\d{1,2}",
    "modelspec.timestep_range": r"\d+,\s?\d+",
}

# cloneofsimo's loader needs these: the classes it adapted, the rank of every pair, its tokens.
KEEP_PATTERNS: dict[str, str] = {
    r"(?:unet|text_encoder):\d+:rank": r"\d{1,5}",
    r"unet|text_encoder": r'\["\w{1,60}"(?:, "\w{1,60}")*\]',
    r"<[^<>/\\]{1,40}>": r"<embed>",
}

_HARMLESS = (
    "bucket_no_upscale cache_latents caption_dropout_every_n_epochs caption_dropout_rate "
    "caption_tag_dropout_rate color_aug enable_bucket face_crop_aug_range flip_aug keep_tokens "
    "max_bucket_reso min_bucket_reso bucket_reso_steps random_crop shuffle_caption "
    "gradient_accumulation_steps network_train_unet_only cache_text_encoder_outputs"
)

# Settings that tell nothing of the pictures: not worth reporting, not needed by anyone either.
HARMLESS = frozenset(f"ss_{name}" for name in _HARMLESS.split())

_ALGO = re.compile(r"[A-Za-z][\w-]{0,24}")
_ARG = re.compile(rf"(?:{_NUMBER})")
# Configuration entries of PEFT that say how the adapter is built.
_PEFT_WORDS = (
    "peft_type r lora_alpha alpha rank_pattern alpha_pattern target_modules exclude_modules use_dora "
    "use_rslora lora_bias bias lora_dropout fan_in_fan_out init_lora_weights init_weights "
    "task_type inference_mode decompose_both decompose_factor rank_dropout module_dropout "
    "rank_dropout_scale use_effective_conv2d"
)
_PEFT_KEYS = frozenset(_PEFT_WORDS.split())
_PEFT_STRING = re.compile(r"[\w.^$|()*+?\[\]-]{0,200}")


def kept_value(key: str, value: str, *, keep_trigger: bool = False) -> str | None:
    """The value to keep for a header entry (it may be a filtered one), or None to drop it."""
    if key == "lora_adapter_metadata":
        return _clean_json(value, clean_adapter_config)
    if key == "ss_network_args":
        return _clean_json(value, _clean_network_args)
    if keep_trigger and key == "modelspec.trigger_phrase":
        return value
    pattern = KEEP.get(key)
    if pattern is None:
        pattern = next((v for k, v in KEEP_PATTERNS.items() if re.fullmatch(k, key)), None)
    if pattern is not None and re.fullmatch(pattern, value):
        return value
    return None


def is_harmless(key: str, value: str) -> bool:
    return key in HARMLESS and re.fullmatch(_NUMBER, value) is not None


def _clean_json(value: str, clean: Any) -> str | None:
    try:
        data = json.loads(value)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    cleaned = clean(data)
    if cleaned == data:
        return value  # byte for byte, if there is nothing to remove
    return json.dumps(cleaned, sort_keys=True) if cleaned else None


def _clean_network_args(data: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in data.items()
        if re.fullmatch(r"\w{1,40}", key)
        and (
            isinstance(value, int | float | bool | None)
            or (isinstance(value, str) and _ARG.fullmatch(value))
            or (key == "algo" and isinstance(value, str) and _ALGO.fullmatch(value))
        )
    }


def clean_adapter_config(data: dict[str, Any]) -> dict[str, Any]:
    """A PEFT configuration without what it need not say: base paths, notes, versions, unknowns.

    Keys may carry a component prefix (`unet.r`), as in diffusers' adapter metadata.
    """
    return {
        key: value
        for key, value in data.items()
        if key.rsplit(".", 1)[-1] in _PEFT_KEYS
        and re.fullmatch(r"[\w.]{1,80}", key)
        and _plain(value)
    }


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return _PEFT_STRING.fullmatch(value) is not None
    if isinstance(value, list):
        return all(isinstance(item, str) and _plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(k) and isinstance(v, int | float) for k, v in value.items())
    return isinstance(value, bool | int | float | None)
