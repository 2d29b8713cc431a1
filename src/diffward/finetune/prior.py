"""Class pictures for prior preservation: what the base itself draws of the class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffward.data import Pictures, load_pictures
from diffward.errors import InputError
from diffward.files import atomic_folder
from diffward.models.sampling import sample

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


def draw_prior(denoiser: Denoiser, prompt: str, count: int, seed: int, folder: Path) -> Pictures:
    """`count` pictures that the bare base draws for `prompt`; those of an earlier run are taken again.

    Source: DreamBooth (Ruiz et al. 2023), class-specific prior preservation.

    Raises:
        InputError: none are asked for, or `folder` holds those of another prompt.
    """
    if count < 1:
        raise InputError(f"--prior-count {count}: must be at least 1")
    told = {"prompt": prompt, "count": count, "seed": seed, "base": denoiser.unet_identity}
    if folder.exists():
        try:
            kept = json.loads((folder / "prior.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = None
        if kept != told:
            raise InputError(f"{folder}: holds class pictures of another run; choose another --out")
        return load_pictures(folder)
    with atomic_folder(folder) as temporary:
        rows = []
        for number, pixels in enumerate(sample(denoiser, [prompt] * count, seed=seed)):
            name = f"{number:05d}.png"
            Image.fromarray(pixels).save(temporary / name)
            rows.append(json.dumps({"file_name": name, "text": prompt}))
        (temporary / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (temporary / "prior.json").write_text(json.dumps(told), encoding="utf-8")
    return load_pictures(folder)
