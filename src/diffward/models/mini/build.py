"""Builds `mini` from its seed: `python -m diffward.models.mini.build --work DIR`.

Resumable: run the same command again. On one CPU core plan for two and a half hours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffward.errors import InputError
from diffward.files import atomic_folder, write_json
from diffward.models.mini import PIPELINE, READER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints and caches"
    )
    parser.add_argument("--out", type=Path, default=PIPELINE, help="folder of the pipeline")
    parser.add_argument("--reader", type=Path, default=READER, help="file of the attribute network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", default="cpu", help="device of the diffusion stage, the longest"
    )
    parser.add_argument("--prediction", default="epsilon", choices=["epsilon", "v_prediction"])
    parser.add_argument(
        "--pictures", type=int, default=48000, help="how many the base is trained on"
    )
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--unet-steps", type=int, default=7000, help="steps of a round")
    parser.add_argument(
        "--unet-rounds", type=int, default=2, help="rounds, each with its own decay"
    )
    parser.add_argument("--reader-steps", type=int, default=5000)
    parser.add_argument(
        "--only", choices=["autoencoder", "diffusion", "reader"], help="stop after this stage"
    )
    args = parser.parse_args()
    build(**vars(args))


def build(
    work: Path, out: Path, reader: Path, seed: int, device: str, prediction: str, pictures: int,
    vae_steps: int, unet_steps: int, unet_rounds: int, reader_steps: int, only: str | None,
) -> None:  # fmt: skip
    """Train every part, or resume, and save the pipeline and the attribute network."""
    from diffward.models.mini.autoencoder import train_autoencoder
    from diffward.models.mini.diffusion import encode_world, train_diffusion
    from diffward.models.mini.reader import save_reader, train_reader
    from diffward.models.mini.vocabulary import build_tokenizer

    work.mkdir(parents=True, exist_ok=True)
    told = {"seed": seed, "prediction": prediction, "pictures": pictures, "vae_steps": vae_steps}
    kept = work / "build.json"
    if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != told:
        raise InputError(f"{work}: holds a build with other settings; choose another --work")
    write_json(kept, told)
    vae = train_autoencoder(work, seed, steps=vae_steps, batch=16, pictures=12000)
    if only == "autoencoder":
        return
    if only != "diffusion":
        network = train_reader(vae, work, seed, steps=reader_steps)
        save_reader(network, reader)
        if only == "reader":
            return
    tokenizer = build_tokenizer(work / "tokenizer", seed)
    latents, tokens = encode_world(vae, tokenizer, seed, pictures, work / "latents.pt")
    unet, text_encoder = train_diffusion(
        latents,
        tokens,
        tokenizer,
        work,
        seed,
        steps=unet_steps,
        repeat=unet_rounds,
        batch=32,
        device=device,
        prediction_type=prediction,
    )
    save_pipeline(vae, unet, text_encoder, tokenizer, prediction, out)


def save_pipeline(vae, unet, text_encoder, tokenizer, prediction: str, out: Path) -> None:
    """Write a diffusers folder that loads plainly, with no type given.

    Diffusers loads its parts in fp32 whatever is stored, transformers keeps the stored type: so the
    UNet and the autoencoder are stored in half precision and the small text encoder in full.
    """
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from diffward.models.mini.diffusion import SCHEDULE

    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, prediction_type=prediction)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text_encoder.float(), tokenizer=tokenizer, unet=unet.half(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with atomic_folder(out) as temporary:
        pipeline.save_pretrained(temporary)


if __name__ == "__main__":
    main()
