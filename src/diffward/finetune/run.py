"""A whole training run: from a folder of pictures to a LoRA that other tools load."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffward.data import Manifest, Pictures, random_split, select
from diffward.errors import InputError
from diffward.files import write_json
from diffward.finetune.loop import TrainResult, train
from diffward.finetune.method import METHODS
from diffward.finetune.samples import SampleGrid
from diffward.finetune.settings import Settings
from diffward.models.features import encode_pictures
from diffward.provenance import hardware, versions, write_config

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

WEIGHTS = "pytorch_lora_weights.safetensors"
CHECKPOINT = "checkpoint.pt"
SPLIT = "split.json"


def run_training(
    denoiser: Denoiser,
    pictures: Pictures,
    method: str,
    settings: Settings,
    out: Path,
    *,
    split: Manifest | None = None,
    config: dict[str, Any] | None = None,
    cache: bool = True,
) -> TrainResult:
    """Train on `pictures` (only on the members of `split`, if given) and write the result to `out`.

    Writes the LoRA (or the pipeline, after full fine-tuning), `config.yaml` and `run.json`; `split.json`
    if there is a split, `samples.png` if there are prompts. Running it again resumes, or returns at
    once if it had finished. Nothing about the data is written into the model file.

    Raises:
        InputError: `out` holds another run, or there is nothing to train on.
    """
    entry = METHODS[method]
    chosen = select(pictures, split)[0] if split else pictures
    if not len(chosen):
        raise InputError("there is no picture to train on")
    began = time.monotonic()
    features = encode_pictures(denoiser, chosen, cache=cache, flip=settings.flip)
    repeats = [p.repeats for p in chosen] * (2 if settings.flip else 1)
    prompts = settings.sample_prompts
    if settings.sample_every and not prompts:
        prompts = list(dict.fromkeys(chosen.captions))[:4]
    grid = SampleGrid(denoiser, prompts, settings, out)

    def start(step: int) -> None:
        # Only now is it sure that `out` is not another run's.
        write_config({**(config or {}), **asdict(settings)}, out / "config.yaml")
        if split:
            split.save(out / SPLIT)
        if step == 0:
            grid.clear()

    result = train(
        denoiser, features, entry.obj(), settings,
        checkpoint=out / CHECKPOINT, repeats=repeats, on_start=start, on_step=grid.after_step,
    )  # fmt: skip
    _save(denoiser, result, out)
    grid.finish(result.steps)
    write_json(
        out / "run.json",
        {
            "method": method,
            "steps": result.steps,
            "passes_per_picture": result.exposure,
            "loss_first": _mean(result.losses[:20]),
            "loss_last": _mean(result.losses[-20:]),
            "wall_seconds": time.monotonic() - began,
            "versions": versions(),
            "hardware": hardware(str(denoiser.device)),
            "settings": asdict(settings),
        },
    )
    return result


def holdout_split(pictures: Pictures, holdout: float, seed: int) -> Manifest:
    """A random split that keeps `holdout` of the pictures out of the training, for an honest audit."""
    if not 0 < holdout < 1:
        raise InputError(f"--holdout {holdout}: give a share between 0 and 1")
    return random_split(pictures, member_share=1 - holdout, seed=seed)


def _save(denoiser: Denoiser, result: TrainResult, out: Path) -> None:
    from diffward.lora import write_lora

    if result.weights is not None:
        write_lora(result.weights, out / WEIGHTS, "diffusers")
    else:
        denoiser.save_pipeline(out / "pipeline")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
