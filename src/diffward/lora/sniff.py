"""What a set of tensors is, told by its keys: layout, kind, and which tensor plays which role.

Never by file name and never by metadata: both are wrong too often.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from diffward.errors import InputError
from diffward.lora.names import from_comfyui, from_diffusers, from_kohya, from_peft

# (ending of a key, role). The longest ending that matches wins.
_ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    "_lora.alpha": "alpha",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f".lokr_{name}": f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
}
_BY_LENGTH = sorted(_ROLES.items(), key=lambda item: -len(item[0]))

_UNSUPPORTED = {
    "OFT or BOFT": re.compile(r"\.oft_(?:blocks|r|diag)|\.oft_R"),
    "LyCORIS 'full' or norm difference": re.compile(r"\.diff(?:_b)?$|\.w_norm$|\.b_norm$"),
    "IA3": re.compile(r"\.on_input$|\.ia3_l"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "a LoRA with trained biases": re.compile(r"\.lora_B(?:\.\w+)?\.bias$"),
    "an adapter of embeddings": re.compile(r"\.lora_embedding_[AB]"),
    "VeRA": re.compile(r"\.vera_lambda_"),
    "a PEFT adapter with fully trained modules": re.compile(r"\.modules_to_save\."),
}
_POSITIONAL = re.compile(r"^(unet|text_encoder)[:](\d+):(up|down)$")
_EMBEDDING = re.compile(r"^<[^<>]{1,80}>$|^bundle_emb\.|^(?:clip_l|clip_g|t5xxl|emb_params)$")
_CHECKPOINT = re.compile(
    r"^(?:model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.|"
    r"down_blocks\.|up_blocks\.|mid_block\.|conv_in\.|double_blocks\.|(?:text_model\.)?encoder\.|"
    r"text_model\.|decoder\.|embeddings\.|transformer_blocks\.|time_embedding\.|unet\.|vae\.|model\.)"
)
_PEFT_ADAPTER = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.(?!weight$)[^.]+(\.weight)?$")


@dataclass
class Layout:
    """`modules`: {canonical name: {role: tensor key}}; `extras`: {embedding name: tensor key}."""

    format: str
    kind: str
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)


def split_key(key: str) -> tuple[str, str] | None:
    """`x.lora_A.weight` → (`x`, `down`); None for a key that plays no role in an adapter."""
    # PEFT's in-memory state dicts carry the adapter's name: x.lora_A.default.weight
    key = _PEFT_ADAPTER.sub(lambda match: f".{match[1]}{match[2] or ''}", key)
    for ending, role in _BY_LENGTH:
        if key.endswith(ending) and len(key) > len(ending):
            return key[: -len(ending)], role
    return None


def sniff(
    shapes: Mapping[str, tuple[int, ...]], where: object, component: str | None = None
) -> Layout:
    """Tell what the tensors {key: shape} are. `component` is set for one part of a PEFT folder.

    Raises `InputError` for an empty file, a full checkpoint, an unsupported adapter, or no adapter.
    """
    if not shapes:
        raise InputError(f"{where}: holds no tensors")
    for name, pattern in _UNSUPPORTED.items():
        key = next((key for key in shapes if pattern.search(key)), None)
        if key is not None:
            raise InputError(f"{where}: is {name} (tensor {key!r}), which is not supported")
    if any(_POSITIONAL.match(key) for key in shapes):
        return _positional(shapes, where)
    extras = {key: key for key in shapes if _EMBEDDING.match(key)}
    roles = {key: split_key(key) for key in shapes if key not in extras}
    if not any(role and role[1] != "alpha" for role in roles.values()):
        if extras and len(extras) == len(shapes):
            return Layout("embedding", "textual_inversion", {}, extras)
        raise InputError(_not_a_lora(shapes, where))
    unknown = [key for key, role in roles.items() if role is None]
    if unknown:
        raise InputError(
            f"{where}: {len(unknown)} tensors belong to no known adapter, the first is {unknown[0]!r}"
        )
    form = _format(list(roles))
    modules: dict[str, dict[str, str]] = {}
    for key, role in roles.items():
        assert role is not None
        width = _text_width(shapes, role[0])
        found = _canonical(role[0], form, width, component)
        if found is None:
            raise InputError(f"{where}: tensor {key!r} has a prefix of no known layout")
        name = found
        if role[1] in modules.setdefault(name, {}):
            raise InputError(
                f"{where}: {key!r} and {modules[name][role[1]]!r} name the same tensor"
            )
        modules[name][role[1]] = key
    _check_complete(modules, where)
    return Layout(form, _kind(modules, shapes), modules, extras)


def _not_a_lora(shapes: Mapping[str, tuple[int, ...]], where: object) -> str:
    known = sum(1 for key in shapes if _CHECKPOINT.match(key))
    if known > len(shapes) // 2:
        return (
            f"{where}: is a full checkpoint ({len(shapes)} tensors), not a LoRA; "
            "give the adapter file, or pass this one as --base"
        )
    return f"{where}: is not a LoRA (first tensor: {next(iter(shapes))[:80]!r})"


def _format(keys: list[str]) -> str:
    def some(test: str) -> bool:
        return any(re.search(test, key) for key in keys)

    if some(r"^(?:lora_(?:unet|te\d?|transformer)_|lycoris_)"):
        return "kohya"
    if some(r"^(?:diffusion_model\.|text_encoders\.|clip_[lg]\.)"):
        return "comfyui"
    if some(r"^base_model\.model\."):
        return "peft"
    if some(r"_lora\.(?:down|up)\.|\.lora\.(?:down|up)\.|lora_linear_layer\."):
        return "diffusers-old"
    if some(r"^(?:unet|text_encoder(?:_\d)?|transformer)\."):
        return "diffusers"
    return "peft"


def _canonical(module: str, form: str, width: int | None, component: str | None) -> str | None:
    if form == "kohya":
        return from_kohya(module)
    if form == "comfyui":
        return from_comfyui(module)
    if form == "peft" or component is not None:
        return from_peft(module, width, component)
    return from_diffusers(module)


def _text_width(shapes: Mapping[str, tuple[int, ...]], module: str) -> int | None:
    for ending in (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight"):
        shape = shapes.get(module + ending)
        if shape is not None and len(shape) == 2:
            return 1280 if shape[1] in (1280, 5120) else shape[1]
    return None


_NEEDED = (
    {"down", "up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
)


def _check_complete(modules: Mapping[str, Mapping[str, str]], where: object) -> None:
    for name, roles in modules.items():
        lokr = all(
            f"lokr_{w}" in roles or {f"lokr_{w}_a", f"lokr_{w}_b"} <= roles.keys()
            for w in ("w1", "w2")
        )
        if not lokr and not any(needed <= roles.keys() for needed in _NEEDED):
            raise InputError(
                f"{where}: module {name!r} is incomplete, it has only {', '.join(sorted(roles))}; "
                "the file was cut or edited"
            )


def _kind(modules: Mapping[str, Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    roles = {role for found in modules.values() for role in found}
    if roles & {"magnitude", "dora_scale"}:
        return "dora"
    if any(role.startswith("lokr_") for role in roles):
        return "lokr"
    if any(role.startswith("hada_") for role in roles):
        return "loha"
    convolution = any(
        len(shapes[key]) == 4 and shapes[key][2:] != (1, 1)
        for found in modules.values()
        for role, key in found.items()
        if role in ("down", "mid")
    )
    return "locon" if convolution or "mid" in roles else "lora"


def _positional(shapes: Mapping[str, tuple[int, ...]], where: object) -> Layout:
    modules: dict[str, dict[str, str]] = {}
    extras: dict[str, str] = {}
    for key in shapes:
        match = _POSITIONAL.match(key)
        if match:
            modules.setdefault(f"{match[1]}:{match[2]}", {})[match[3]] = key
        elif _EMBEDDING.match(key):
            extras[key] = key
        else:
            raise InputError(f"{where}: tensor {key!r} belongs to no known adapter")
    _check_complete(modules, where)
    ordered = sorted(modules, key=lambda name: (name.split(":")[0], int(name.split(":")[1])))
    return Layout("cloneofsimo", "lora", {name: modules[name] for name in ordered}, extras)


def sniff_list(shapes: Iterable[tuple[int, ...]], where: object) -> Layout:
    """cloneofsimo's pickled list: up, down, up, down, … of one model, found out by its shapes."""
    shapes = list(shapes)
    pairs = list(zip(shapes[::2], shapes[1::2]))
    if not pairs or len(shapes) % 2 or not all(_is_pair(*pair) for pair in pairs):
        raise InputError(
            f"{where}: a list of tensors, but not of LoRA pairs (up, down, up, down, …)"
        )
    # A text encoder's attention is square and of one width; a UNet is neither.
    widths = {width for up, down in pairs for width in (up[0], down[1])}
    component = "text_encoder" if len(widths) == 1 else "unet"
    modules = {
        f"{component}:{i}": {"up": str(2 * i), "down": str(2 * i + 1)} for i in range(len(pairs))
    }
    return Layout("cloneofsimo-list", "lora", modules, {})


def _is_pair(up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(up) == len(down) >= 2 and up[1] == down[0] and up[1] <= max(up[0], down[1])
