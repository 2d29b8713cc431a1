from __future__ import annotations


def sample(
    prompt: str,
    lora: str | None = None,
    base: str = "mini",
    out: str = "samples.png",
    n: int = 8,
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
    resolution: int | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Draw pictures of one prompt with a base and, if given, a LoRA; written side by side.

    Args:
        prompt: what to draw.
        lora: LoRA file or folder.
        n: how many pictures.
    """
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from diffward.errors import InputError
    from diffward.files import atomic_path
    from diffward.lora import open_lora
    from diffward.models.load import load_base
    from diffward.models.sampling import sample as draw

    for option, value, least in (("n", n, 1), ("steps", steps, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"--{option} {value}: must be at least {least}")
    if Path(out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--out {out}: name a .png, .jpg or .webp file")
    denoiser = load_base(base, device=device, precision=precision, resolution=resolution)
    if lora:
        denoiser.attach(open_lora(lora).load())
    pictures = draw(denoiser, [prompt] * n, seed=seed, steps=steps, guidance=guidance)
    with atomic_path(Path(out)) as temporary:
        Image.fromarray(np.concatenate(list(pictures), axis=1)).save(temporary)
    print(f"wrote {out}")
