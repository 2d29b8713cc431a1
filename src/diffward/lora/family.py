"""Which base model a LoRA was made for, told from the widths of what it adapts.

Widths decide, metadata is only compared with them: files that claim another base are common.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

CROSS_ATTENTION = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
TEXT_WIDTH = {768: "sd1", 1024: "sd2"}

LABELS = {
    "sd1": "SD 1.x",
    "sd2": "SD 2.x",
    "sdxl": "SDXL",
    "sd3": "SD 3",
    "flux": "FLUX",
    "unknown": "an unknown base",
}


def family_of_width(width: int) -> str:
    """The family of UNets with this cross-attention width; `unet-N` for widths of no known base."""
    return CROSS_ATTENTION.get(width, f"unet-{width}")


def label(family: str, width: int | None = None) -> str:
    """A family in words: `SDXL (cross-attention width 2048)`."""
    name = LABELS.get(family)
    if name is None:
        return f"a UNet with cross-attention width {family.removeprefix('unet-')}"
    return f"{name} (cross-attention width {width})" if width else name


def cross_width(shapes: Iterable[tuple[str, tuple[int, ...] | None]]) -> int | None:
    """The input width of the cross-attention keys and values, or None if they are not adapted."""
    widths = Counter(
        shape[1]
        for name, shape in shapes
        if shape is not None
        and len(shape) > 1
        and name.startswith("unet.")
        and name.endswith(("attn2.to_k", "attn2.to_v", "attn2_to_k", "attn2_to_v"))
    )
    return widths.most_common(1)[0][0] if widths else None


_FLUX = re.compile(r"(?:^|[._])(?:single_transformer_blocks|double_blocks|single_blocks)[._]")
_SD3 = re.compile(r"(?:^|[._])joint_blocks[._]")
_BLOCKS = re.compile(r"^transformer\.transformer_blocks\.\d+\.")


def base_family(shapes: dict[str, tuple[int, ...] | None]) -> str:
    """Family from {canonical module name: weight shape (out, in, …)}; the shape may be unknown.

    Order of evidence: transformer block names, cross-attention width, text encoder widths.
    """
    if any(_FLUX.search(name) for name in shapes):
        return "flux"
    if any(_SD3.search(name) for name in shapes):
        return "sd3"
    # FLUX and SD3 share the names of their double-stream blocks in diffusers; widths differ.
    dims = {d for n, s in shapes.items() if s is not None and _BLOCKS.match(n) for d in s[:2]}
    if 3072 in dims:
        return "flux"
    if dims & {1536, 2432}:
        return "sd3"
    width = cross_width(shapes.items())
    if width is not None:
        return family_of_width(width)
    positional = _positional_width(shapes)
    if positional is not None:
        return family_of_width(positional)
    return _text_family(shapes)


def _positional_width(shapes: dict[str, tuple[int, ...] | None]) -> int | None:
    """Cross-attention width of index-named UNet pairs: inputs that are neither square nor GEGLU."""
    found = Counter(
        shape[1]
        for name, shape in shapes.items()
        if shape is not None
        and len(shape) > 1
        and name.startswith("unet:")
        and shape[0] != shape[1]
        and shape[0] != 8 * shape[1]
    )
    return found.most_common(1)[0][0] if found else None


def _text_family(shapes: dict[str, tuple[int, ...] | None]) -> str:
    if any(name.startswith("text_encoder_2.") for name in shapes):
        return "sdxl"
    widths = Counter(
        min(shape[:2])
        for name, shape in shapes.items()
        if shape is not None
        and len(shape) > 1
        and name.startswith(("text_encoder.", "text_encoder:"))
    )
    return TEXT_WIDTH.get(widths.most_common(1)[0][0], "unknown") if widths else "unknown"


_CLAIMS = (
    (re.compile(r"flux", re.I), "flux"),
    (re.compile(r"sd_?xl|diffusion-xl|sdxl", re.I), "sdxl"),
    (re.compile(r"sd_?3|diffusion-v?3", re.I), "sd3"),
    (re.compile(r"sd_?v?2|diffusion-v2", re.I), "sd2"),
    (re.compile(r"sd_?v?1|diffusion-v1", re.I), "sd1"),
)


def claimed_families(metadata: dict[str, str]) -> dict[str, str]:
    """{metadata key: family it claims}."""
    claims: dict[str, str] = {}
    for key in ("ss_base_model_version", "modelspec.architecture", "baseModel"):
        for pattern, family in _CLAIMS:
            if pattern.search(metadata.get(key, "")):
                claims[key] = family
                break
    if metadata.get("ss_v2") == "True":
        claims["ss_v2"] = "sd2"
    return claims


def family_conflict(family: str, metadata: dict[str, str]) -> str | None:
    """A sentence where the metadata claims another base than the shapes show, else None."""
    if family == "unknown" or family.startswith("unet-"):
        return None
    wrong = {key: claim for key, claim in claimed_families(metadata).items() if claim != family}
    if not wrong:
        return None
    said = ", ".join(
        f"{key} = {metadata[key]!r} says {label(claim)}" for key, claim in wrong.items()
    )
    return f"the shapes are those of {label(family)}, but {said}"
