from __future__ import annotations

from diffward.finetune.settings import Settings


def train(
    data: str,
    settings: Settings,
    base: str = "mini",
    method: str = "plain",
    out: str = "runs/train",
    split: str | None = None,
    holdout: float = 0.0,
    holdout_data: str | None = None,
    auxiliary: float = 0.5,
    prior_data: str | None = None,
    prior_prompt: str = "",
    prior_count: int = 100,
    mask: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    default_caption: str = "",
    limit: int | None = None,
    resolution: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    base_config: str | None = None,
    cache: bool = True,
) -> None:
    """Fine-tune a base on a folder of pictures. Run the same command again to resume.

    Args:
        data: folder of pictures (sidecar captions, metadata.jsonl or .csv, kohya folders) or a hub dataset id.
        base: mini, a diffusers folder, a checkpoint file or a hub id.
        method: see `diffward list methods`.
        out: folder for the LoRA, its settings and samples.
        split: manifest of `diffward split`: train on its members only.
        holdout: share of the pictures to hold out for the audit, at random; writes OUT/split.json. Methods
            that compare members with others hold out a quarter if nothing is said.
        holdout_data: folder of pictures that do not train (held out, or look-alikes) for such a method, in
            place of a part of the held-out ones.
        auxiliary: share of the held-out pictures and of the members that such a method may compare; the
            audit leaves them out.
        prior_data: folder of class pictures, for prior preservation (DreamBooth).
        prior_prompt: instead of --prior-data: draw class pictures for this prompt with the base.
        prior_count: how many to draw.
        mask: freeze mask of `diffward guard learn`: what it freezes stays as it is, bit for bit.
        default_caption: caption of pictures that have none.
        limit: use only so many of the pictures.
        resolution: side in pixels; the base's own by default.
        device: auto, cpu, cuda, mps.
        precision: auto (bf16 on a GPU), fp32 or bf16.
        base_config: diffusers folder that describes a single-file checkpoint, where there is no network.
        cache: keep encoded pictures and captions on disk for the next run.
    """
    from pathlib import Path
    from typing import Any

    from diffward.data import Manifest, load_pictures
    from diffward.errors import InputError
    from diffward.finetune.auxiliary import SHARE
    from diffward.finetune.prior import draw_prior
    from diffward.finetune.run import WEIGHTS, check_method, compares, holdout_split, run_training
    from diffward.guard.artefacts import open_mask
    from diffward.models.load import load_base

    if split and holdout:
        raise InputError("give --split or --holdout, not both")
    if prior_data and prior_prompt:
        raise InputError("give --prior-data or --prior-prompt, not both")
    # Before pictures are drawn or encoded for nothing.
    check_method(method, settings, bool(holdout_data))
    if not (split or holdout) and compares(method, settings):
        holdout = SHARE
    if split is None and not holdout:
        told = "all of them train; without a held-out part an audit cannot tell members from others"
    else:
        told = "only the members of the split train"
    columns: dict[str, Any] = {
        "image_column": image_column, "caption_column": caption_column, "default_caption": default_caption,
    }  # fmt: skip
    pictures = load_pictures(data, limit=limit, **columns)
    others = load_pictures(holdout_data, **columns) if holdout_data else None
    prior = load_pictures(prior_data, **columns) if prior_data else None
    print("\n".join(f"pictures: {line}" for line in [*pictures.told(), told]))
    manifest = Manifest.load(split) if split else None
    if holdout:
        manifest = holdout_split(pictures, holdout, settings.seed)
    denoiser = load_base(
        base, device=device, precision=precision, resolution=resolution, config=base_config
    )
    kept = open_mask(mask, denoiser) if mask else None
    if kept:
        print(f"mask: {kept.told()}")
    if prior_prompt:
        prior = draw_prior(denoiser, prior_prompt, prior_count, settings.seed, Path(out) / "prior")
    config = {
        "data": data, "base": base, "method": method, "out": out, "split": split, "holdout": holdout,
        "holdout_data": holdout_data, "auxiliary": auxiliary, "prior_data": prior_data,
        "prior_prompt": prior_prompt, "prior_count": prior_count, "mask": mask,
        "image_column": image_column, "caption_column": caption_column, "default_caption": default_caption,
        "limit": limit, "resolution": resolution, "device": device, "precision": precision,
        "base_config": base_config, "cache": cache,
    }  # fmt: skip
    result = run_training(
        denoiser, pictures, method, settings, Path(out), split=manifest, auxiliary=auxiliary, others=others,
        prior=prior, frozen=kept.frozen if kept else (), config=config, cache=cache,
    )  # fmt: skip
    made = Path(out) / (WEIGHTS if result.weights is not None else "pipeline")
    print(
        f"wrote {made}: {result.steps} steps, {result.exposure:.1f} passes a picture, loss {result.losses[-1]:.4f}"
    )
    if result.kept_at is not None:
        print(f"kept the weights after step {result.kept_at}")
    for reading in result.readings[-1:]:
        print(f"gauge after step {reading.step}: {reading}")
    for key, value in result.facts.items():
        print(f"{key}: {value}")
