from __future__ import annotations

from typing import Literal


def convert(
    file: str,
    to: Literal["diffusers", "peft", "kohya"] = "diffusers",
    out: str = "",
    base: str | None = None,
) -> None:
    """Write a LoRA in the layout of another tool; ranks, alphas and dtypes are carried exactly.

    Args:
        file: a LoRA file or folder of any layout.
        to: the layout to write.
        out: file to write (a folder for peft).
        base: the base it is for; only needed for files that number their modules.
    """
    from diffward.errors import InputError
    from diffward.lora import convert_lora

    if not out:
        raise InputError("--out is missing: say where to write the converted LoRA")
    shapes = None
    if base:
        from diffward.models.load import load_base

        shapes = load_base(base, device="cpu").module_shapes()
    convert_lora(file, to, out, module_shapes=shapes)
    print(f"wrote {out}")
