"""A whole training run: from a folder of pictures to a LoRA that other tools load."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffward.data import Manifest, Pictures, near_duplicate_groups, random_split, select
from diffward.errors import InputError
from diffward.files import write_json
from diffward.finetune.auxiliary import build_auxiliary, mark_auxiliary
from diffward.finetune.loop import TrainResult, check_options, train
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
    auxiliary: float = 0.5,
    others: Pictures | None = None,
    prior: Pictures | None = None,
    frozen: Collection[str] = (),
    config: dict[str, Any] | None = None,
    cache: bool = True,
) -> TrainResult:
    """Train on `pictures` (only on the members of `split`, if given) and write the result to `out`.

    Writes the LoRA (or the pipeline, after full fine-tuning), `config.yaml` and `run.json`; `split.json`
    if there is a split, `samples.png` if there are prompts. Running it again resumes, or returns at
    once if it had finished. Nothing about the data is written into the model file.

    Args:
        auxiliary: share of either side of `split` that a private method and the gauge may compare; the
            audit leaves it out. A split that says which keeps its own.
        others: pictures that do not train, for the private method in place of held-out ones.
        prior: class pictures (DreamBooth's prior preservation).
        frozen: parameters of the UNet that a mask keeps as they are.

    Raises:
        InputError: `out` holds another run, or there is nothing to train on.
    """
    instance = METHODS[method].obj()
    check_method(method, settings, others is not None)  # before pictures are encoded for nothing
    compared = compares(method, settings)
    if compared:
        split = _compared(pictures, split, auxiliary, others, settings.seed)
    chosen = select(pictures, split)[0] if split else pictures
    if not len(chosen):
        raise InputError("there is no picture to train on")
    began = time.monotonic()
    features = encode_pictures(denoiser, chosen, cache=cache, flip=settings.flip)
    repeats = [p.repeats for p in chosen] * (2 if settings.flip else 1)
    held = None
    if compared and split:
        held = build_auxiliary(
            denoiser, pictures, split, chosen, others=others, seed=settings.seed, cache=cache
        )
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
        denoiser, features, instance, settings, auxiliary=held,
        prior=encode_pictures(denoiser, prior, cache=cache) if prior else None,
        checkpoint=out / CHECKPOINT, repeats=repeats, groups=_groups(chosen, settings.flip),
        frozen=frozen, on_start=start, on_step=grid.after_step,
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
            "kept_at": result.kept_at,
            "readings": [asdict(reading) for reading in result.readings],
            "facts": result.facts,
            "frozen_tensors": len(frozen),
            "wall_seconds": time.monotonic() - began,
            "versions": versions(),
            "hardware": hardware(str(denoiser.device)),
            "settings": asdict(settings),
        },
    )
    return result


def check_method(method: str, settings: Settings, others: bool) -> None:
    """Refuse what such a run would not look at.

    Args:
        others: whether it is given pictures that do not train.

    Raises:
        InputError: names it.
    """
    check_options(METHODS[method].obj(), settings)
    if others and not compares(method, settings):
        raise InputError(
            f"--holdout-data: method {method} compares with no pictures; leave it out, or give --gauge.every"
        )


def compares(method: str, settings: Settings) -> bool:
    """Whether such a run compares members with pictures that do not train."""
    kind, gauge = METHODS[method].obj, settings.gauge
    return bool(kind.needs_auxiliary or kind.needs_gauge or gauge.every or gauge.stop_auc)


def holdout_split(pictures: Pictures, holdout: float, seed: int) -> Manifest:
    """A random split that keeps `holdout` of the pictures out of the training, for an honest audit."""
    if not 0 < holdout < 1:
        raise InputError(f"--holdout {holdout}: give a share between 0 and 1")
    return random_split(pictures, member_share=1 - holdout, seed=seed)


def _compared(
    pictures: Pictures, split: Manifest | None, share: float, others: Pictures | None, seed: int
) -> Manifest:
    """The split with its auxiliary pictures marked."""
    if not 0 < share < 1:
        raise InputError(f"--auxiliary {share}: give a share between 0 and 1")
    if split is None:
        raise InputError(
            "this needs pictures that do not train: hold some out with --holdout, or give a --split"
        )
    if split.auxiliary:
        return split
    return mark_auxiliary(pictures, split, share, seed, held_out=others is None)


def _groups(pictures: Pictures, flip: bool) -> list[int]:
    """Near-duplicates share a number; so do a picture and its mirror image."""
    numbers = [0] * len(pictures)
    for number, group in enumerate(near_duplicate_groups(pictures, poses=False)):
        for row in group:
            numbers[row] = number
    return numbers * (2 if flip else 1)


def _save(denoiser: Denoiser, result: TrainResult, out: Path) -> None:
    from diffward.lora import write_lora

    if result.weights is not None:
        write_lora(result.weights, out / WEIGHTS, "diffusers", result.facts)
    else:
        denoiser.save_pipeline(out / "pipeline")


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
