"""Matching the modules of a LoRA to those of a base model."""

from __future__ import annotations

import math
import re
from itertools import permutations

from diffward.errors import InputError
from diffward.lora.family import base_family, cross_width, label
from diffward.lora.module import LoraModule
from diffward.lora.names import split_component, without_text_model
from diffward.lora.weights import LoraWeights, renamed

Shapes = dict[str, tuple[int, ...]]


def resolve(weights: LoraWeights, module_shapes: Shapes) -> LoraWeights:
    """See `LoraWeights.resolve`."""
    names = _positional(weights, module_shapes) if weights.is_positional else None
    if names is None:
        names = _by_name(weights, module_shapes)
    modules: dict[str, LoraModule] = {}
    for ours, theirs in names.items():
        module, shape = weights.modules[ours], tuple(module_shapes[theirs])
        if not _fits(module, shape):
            raise InputError(
                f"{_looks_like(weights, module_shapes)} (module {ours}: the file has "
                f"{list(module.weight_shape)}, the base {list(shape)})"
            )
        if theirs in modules:
            raise InputError(
                f"{_where(weights)}: two modules of the file are {theirs!r} of the base"
            )
        modules[theirs] = renamed(module, theirs, shape)
    return LoraWeights(
        modules, weights.extras, weights.metadata, weights.base_family, weights.source
    )


def _where(weights: LoraWeights) -> str:
    return weights.source or "this LoRA"


def _by_name(weights: LoraWeights, module_shapes: Shapes) -> dict[str, str]:
    index: dict[str, str] = {}
    for name in module_shapes:
        component, path = split_component(name)
        bare = f"{component}.{without_text_model(path)}"
        # Flattened too: what an unflattener cannot know (private module names) still matches.
        for key in (name, bare, _flat(bare)):
            index.setdefault(key, name)
    names, missing = {}, []
    for ours in weights.modules:
        theirs = index.get(ours) or index.get(_flat(ours))
        if theirs is None:
            missing.append(ours)
        else:
            names[ours] = theirs
    if missing:
        family, width = _file_family(weights)
        if _base_words(module_shapes) != label(family, width) and family != "unknown":
            raise InputError(
                f"{_looks_like(weights, module_shapes)} "
                f"({len(missing)} of {len(weights.modules)} modules are not in the base, "
                f"the first is {missing[0]})"
            )
        raise InputError(
            f"{_where(weights)}: {len(missing)} of {len(weights.modules)} modules are not in the "
            f"base, the first is {missing[0]!r}; the LoRA is for another model"
        )
    return names


def _flat(name: str) -> str:
    component, path = split_component(name)
    return f"{component}/{path.replace('.', '_')}"


def _fits(module: LoraModule, shape: tuple[int, ...]) -> bool:
    ours = module.weight_shape
    # A 1x1 convolution and a linear layer are the same matrix, and LoHa and LoKr may fold a kernel
    # into the input axis; the output axis and the count decide.
    if ours[0] != shape[0] or math.prod(ours) != math.prod(shape):
        return False
    folded = module.kind in ("loha", "lokr", "dora") and len(ours) == 2
    return folded or ours[1] == shape[1]


def _file_family(weights: LoraWeights) -> tuple[str, int | None]:
    shapes = {name: module.weight_shape for name, module in weights.modules.items()}
    return base_family(dict(shapes)), cross_width(shapes.items())


def _base_words(module_shapes: Shapes) -> str:
    return label(base_family(dict(module_shapes)), cross_width(module_shapes.items()))


def _looks_like(weights: LoraWeights, module_shapes: Shapes) -> str:
    ours = label(*_file_family(weights))
    base = _base_words(module_shapes)
    if ours == base:
        return f"{_where(weights)}: this LoRA was made for a differently built {base}"
    return f"{_where(weights)}: this LoRA looks like {ours}, the base is {base}"


_BLOCK = re.compile(
    r"^unet\.(down_blocks|up_blocks|mid_block)\.(.*?)transformer_blocks\.(\d+)\.(.+)$"
)
_PARTS = {
    "attn1": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "ff": ("ff.net.0.proj",),
    "attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
}
_SIDES = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")


def _positional(weights: LoraWeights, module_shapes: Shapes) -> dict[str, str]:
    """Names for cloneofsimo's numbered pairs, by the order in which its tool walked the model.

    UNet: down, up, mid blocks (the order of registration in diffusers); in a transformer block
    attn1, feed-forward, attn2, where the feed-forward's gate is adapted only in later versions.
    Text encoder: layer by layer k, v, q, out.
    """
    names: dict[str, str] = {}
    for component in weights.components:
        ours = [name for name in weights.modules if name.startswith(f"{component}:")]
        orders = (
            list(_unet_orders(module_shapes))
            if component == "unet"
            else [_clip_order(component, module_shapes)]
        )
        fitting = [order for order in orders if len(order) == len(ours)]
        best = next(
            (
                order
                for order in fitting
                if all(
                    _fits(weights.modules[a], tuple(module_shapes[b])) for a, b in zip(ours, order)
                )
            ),
            None,
        )
        if best is None:
            if not fitting:
                raise InputError(
                    f"{_looks_like(weights, module_shapes)} ({len(ours)} numbered {component} "
                    f"modules; the base has {' or '.join(str(len(o)) for o in orders) or 'none'})"
                )
            best = fitting[0]  # the shape check of the caller names the first that disagrees
        names.update(zip(ours, best))
    return names


def _unet_orders(module_shapes: Shapes):
    blocks: dict[tuple[int, ...], str] = {}
    for name in module_shapes:
        match = _BLOCK.match(name)
        if match:
            numbers = tuple(int(n) for n in re.findall(r"\d+", match[2]))
            key = (_SIDES[match[1]], *numbers, int(match[3]))
            blocks[key] = name[: -len(match[4]) - 1]
    stems = [blocks[key] for key in sorted(blocks)]
    # The known order first; others only where the shapes rule it out.
    parts = [("attn1", "ff", "attn2"), ("attn1", "attn2")]
    parts += [p for p in permutations(("attn1", "ff", "attn2")) if p not in parts]
    for order in parts:
        paths = [path for part in order for path in _PARTS[part]]
        yield [
            f"{stem}.{path}"
            for stem in stems
            for path in paths
            if f"{stem}.{path}" in module_shapes
        ]


def _clip_order(component: str, module_shapes: Shapes) -> list[str]:
    layers: dict[int, str] = {}
    for name in module_shapes:
        match = re.match(rf"^({component}\..*layers\.(\d+)\.self_attn)\.k_proj$", name)
        if match:
            layers[int(match[2])] = match[1]
    return [f"{layers[index]}.{part}" for index in sorted(layers) for part in _CLIP]
