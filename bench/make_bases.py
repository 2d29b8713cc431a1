"""Other bases than `mini` itself, made of its world, its autoencoder and its words: whether a finding is `mini`'s alone.

`python -m bench.make_bases NAME`, NAME one of `BASES`; resumable; half an hour on one core each.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from bench._claim import claimed
from diffward.errors import InputError
from diffward.files import write_json

FOLDER = Path("runs/bases")
SEED, PICTURES, BATCH = 1, 32_000, 16  # pictures that `mini` was not trained on


@dataclass(frozen=True)
class Base:
    """How a base differs from `mini`, and how long it is trained.

    Attributes:
        width: channels of the two levels.
        warm: whether it goes on from `mini`'s weights.
    """

    prediction: str
    width: tuple[int, int]
    warm: bool
    steps: int


BASES = {
    "v-prediction": Base("v_prediction", (96, 160), True, 2_000),
    "narrow": Base("epsilon", (64, 112), False, 3_500),
}


def built(name: str) -> Path:
    """The diffusers folder of a base; trained if it is not there.

    Raises:
        KeyError: no such base.
        InputError: what lies there was made with other settings.
    """
    wanted, folder = BASES[name], FOLDER / name
    told = {**asdict(wanted), "seed": SEED, "pictures": PICTURES, "batch": BATCH}
    told = json.loads(json.dumps(told))
    with claimed(folder, wait=True):
        kept = FOLDER / f"{name}.json"
        if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != told:
            raise InputError(
                f"{folder}: is made, or begun, with other settings; delete it and its training"
            )
        write_json(kept, told)
        if not folder.exists():
            print(f"build {name}")
            _build(wanted, folder)
    return folder


def _build(wanted: Base, folder: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from diffward.models.mini import PIPELINE
    from diffward.models.mini.build import save_pipeline
    from diffward.models.mini.diffusion import encode_world, train_diffusion

    pipe = StableDiffusionPipeline.from_pretrained(
        PIPELINE, safety_checker=None, torch_dtype=torch.float32
    )
    with claimed(FOLDER / "latents", wait=True):
        latents, tokens = encode_world(
            pipe.vae, pipe.tokenizer, SEED, PICTURES, FOLDER / f"latents-{SEED}-{PICTURES}.pt"
        )
    work = FOLDER / f"{folder.name}-training"
    work.mkdir(exist_ok=True)
    unet, text_encoder = train_diffusion(
        latents, tokens, pipe.tokenizer, work, SEED, steps=wanted.steps, batch=BATCH,
        prediction_type=wanted.prediction, width=wanted.width,
        start=(pipe.unet, pipe.text_encoder) if wanted.warm else None,
    )  # fmt: skip
    save_pipeline(pipe.vae, unet, text_encoder, pipe.tokenizer, wanted.prediction, folder)


if __name__ == "__main__":
    print(built(sys.argv[1]))
