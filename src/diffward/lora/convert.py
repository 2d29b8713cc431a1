"""From one layout to another, tensors untouched."""

from __future__ import annotations

from pathlib import Path

from diffward.errors import InputError
from diffward.lora.file import open_lora
from diffward.lora.write import Format, write_lora


def convert_lora(
    path: str | Path,
    to: Format,
    out: str | Path,
    *,
    module_shapes: dict[str, tuple[int, ...]] | None = None,
) -> None:
    """Write the LoRA at `path` as `to` (`diffusers`, `peft`, `kohya`) at `out`.

    Tensors keep dtype and bits, alpha stays exact, header entries pass the whitelist. With
    `module_shapes` of a base ({full module name: weight shape}) names are taken from it, which
    cloneofsimo's numbered files need. Raises `InputError` where the target cannot express the file.
    """
    out = Path(out)
    if out.exists() and out.samefile(path):
        raise InputError(f"{out}: would overwrite the file it is made from; give another --out")
    weights = open_lora(path).load(dtype=None)
    if module_shapes is not None:
        weights = weights.resolve(module_shapes)
    write_lora(weights, out, to, weights.metadata)
