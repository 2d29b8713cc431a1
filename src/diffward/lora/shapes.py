"""Ranks and weight shapes of adapted modules, from the shapes of their factors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

Shape = tuple[int, ...]


def rank_of(shapes: Mapping[str, Shape]) -> int:
    """Rank of a module from {role: shape}. A LoKr of two full factors has none: its largest one."""
    if "down" in shapes:
        return shapes["down"][0]
    if "hada_w1_b" in shapes:
        return shapes["hada_w1_b"][0]
    for role in ("lokr_w2_b", "lokr_w1_b"):
        if role in shapes:
            return shapes[role][0]
    w2 = shapes["lokr_w2"]
    return min(shapes["lokr_w1"]) * min(w2[0], math.prod(w2[1:]))


def _kron_factor(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name in shapes:
        return shapes[name]
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in shapes:
        return (a[1], b[1], *shapes["lokr_t2"][2:])
    return (a[0], b[1])


def weight_shape(shapes: Mapping[str, Shape]) -> Shape:
    """Shape of the weight difference from {role: shape of the factor}.

    Convolutions whose kernel is folded into the input axis (LoHa, LoKr without a core tensor) come
    out as (out, in·kh·kw): their file does not say how the last axis splits.
    """
    if "down" in shapes:
        up, down = shapes["up"], shapes["down"]
        kernel = shapes["mid"][2:] if "mid" in shapes else down[2:]
        return (up[0], down[1], *kernel)
    if "hada_w1_a" in shapes:
        a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
        if "hada_t1" in shapes:
            return (a[1], b[1], *shapes["hada_t1"][2:])
        return (a[0], b[1])
    w1, w2 = _kron_factor(shapes, "lokr_w1"), _kron_factor(shapes, "lokr_w2")
    return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])


def factors_agree(shapes: Mapping[str, Shape]) -> bool:
    """Whether the factors can be multiplied at all."""
    if any(0 in shape for shape in shapes.values()):
        return False
    dims = {role: len(shape) for role, shape in shapes.items()}
    if "down" in shapes:
        up, down = shapes["up"], shapes["down"]
        if min(dims["up"], dims["down"]) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1:
            return False
        if "mid" in shapes:
            return dims["mid"] == 4 and shapes["mid"][:2] == (up[1], down[0])
        return True
    if "hada_w1_a" in shapes:
        pairs = [(shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"]) for i in (1, 2)]
        if any(len(a) != 2 or len(b) != 2 for a, b in pairs):
            return False
        if "hada_t1" in shapes or "hada_t2" in shapes:
            return all(
                len(shapes.get(f"hada_t{i}", ())) == 4
                and shapes[f"hada_t{i}"][:2] == (pair[0][0], pair[1][0])
                for i, pair in zip((1, 2), pairs)
            ) and (pairs[0][0][1], pairs[0][1][1]) == (pairs[1][0][1], pairs[1][1][1])
        return all(a[1] == b[0] for a, b in pairs) and (
            (pairs[0][0][0], pairs[0][1][1]) == (pairs[1][0][0], pairs[1][1][1])
        )
    return _kron_agrees(shapes)


def _kron_agrees(shapes: Mapping[str, Shape]) -> bool:
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            if len(shapes[name]) not in ((2,) if name == "lokr_w1" else (2, 4)):
                return False
            continue
        a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
        if len(a) != 2 or len(b) != 2:
            return False
        if name == "lokr_w2" and "lokr_t2" in shapes:
            core = shapes["lokr_t2"]
            if len(core) != 4 or core[:2] != (a[0], b[0]):
                return False
        elif a[1] != b[0]:
            return False
    return True


def kind_of(roles: Mapping[str, object], shape: Shape) -> str:
    """Kind of one module: lora, locon, loha, lokr or dora."""
    if "magnitude" in roles or "dora_scale" in roles:
        return "dora"
    if "hada_w1_a" in roles:
        return "loha"
    if "down" not in roles:
        return "lokr"
    return "locon" if "mid" in roles or (len(shape) == 4 and shape[2:] != (1, 1)) else "lora"
