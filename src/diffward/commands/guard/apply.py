from __future__ import annotations


def apply(
    base: str,
    mask: str | None = None,
    edit: str | None = None,
    out: str = "runs/guarded",
    base_config: str | None = None,
) -> None:
    """Write a guarded base to publish: a diffusers folder, edited if asked, with its mask and a card in it.

    With `--out mask.json` only the mask is written, such as one of the public FreezeAsGuard code.

    Args:
        base: mini, a diffusers folder, a checkpoint file or a hub id.
        mask: mask.json of `diffward guard learn`, or a positional text file of the public code.
        edit: edit.safetensors of `diffward guard learn --method uce` or imma.
        out: folder, or a .json file.
        base_config: diffusers folder that describes a single-file checkpoint, where there is no network.
    """
    from pathlib import Path

    from diffward.guard.artefacts import write_base
    from diffward.models.load import load_base

    denoiser = load_base(base, device="cpu", precision="fp32", config=base_config)
    written = write_base(denoiser, mask, edit, Path(out))
    print(
        f"wrote {out}" + (f": {written.told()}" if written else ": an edited base without a mask")
    )
