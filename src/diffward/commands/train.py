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
        holdout: share of the pictures to hold out for the audit, at random; writes OUT/split.json.
        default_caption: caption of pictures that have none.
        limit: use only so many of the pictures.
        resolution: side in pixels; the base's own by default.
        device: auto, cpu, cuda, mps.
        precision: auto (bf16 on a GPU), fp32 or bf16.
        base_config: diffusers folder that describes a single-file checkpoint, where there is no network.
        cache: keep encoded pictures and captions on disk for the next run.
    """
    from pathlib import Path

    from diffward.data import Manifest, load_pictures
    from diffward.errors import InputError
    from diffward.finetune.run import WEIGHTS, holdout_split, run_training
    from diffward.models.load import load_base

    if split and holdout:
        raise InputError("give --split or --holdout, not both")
    if split is None and not holdout:
        told = "all of them train; without a held-out part an audit cannot tell members from others"
    else:
        told = "only the members of the split train"
    pictures = load_pictures(
        data,
        image_column=image_column,
        caption_column=caption_column,
        default_caption=default_caption,
        limit=limit,
    )
    print("\n".join(f"pictures: {line}" for line in [*pictures.told(), told]))
    manifest = Manifest.load(split) if split else None
    if holdout:
        manifest = holdout_split(pictures, holdout, settings.seed)
    denoiser = load_base(
        base, device=device, precision=precision, resolution=resolution, config=base_config
    )
    config = {
        "data": data, "base": base, "method": method, "out": out, "split": split, "holdout": holdout,
        "image_column": image_column, "caption_column": caption_column, "default_caption": default_caption,
        "limit": limit, "resolution": resolution, "device": device, "precision": precision,
        "base_config": base_config, "cache": cache,
    }  # fmt: skip
    result = run_training(
        denoiser, pictures, method, settings, Path(out), split=manifest, config=config, cache=cache
    )
    made = Path(out) / (WEIGHTS if result.weights is not None else "pipeline")
    print(
        f"wrote {made}: {result.steps} steps, {result.exposure:.1f} passes a picture, loss {result.losses[-1]:.4f}"
    )
