"""K LoRAs trained at once over one base, and the same LoRAs one by one.

Both are this package: `train_many`, and `train` job after job. Each job has its own pictures and seed.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench._result import record
from bench._support import base_name, draw_folder, interleaved, mini_base

if TYPE_CHECKING:
    from diffward.finetune.many import Job
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser

SEED = 0
RANK = 8
PICTURES = 64  # in all; each job has its own eighth
OWN = 8


def run(quick: bool = False) -> None:
    device = _device()
    cases = [(16, 8), (16, 4), (32, 4), (8, 8), (4, 8)]
    with mini_base() as base:
        if quick:
            rows = [compare(base, device, k, b, rounds=2, steps=3) for k, b in cases[:2]]
        else:
            rows = [compare(base, device, k, b, rounds=7, steps=6) for k, b in cases]
    record("many-loras", rows, seeds=[SEED], quick=quick, device=device, notes=[
        "many_s, one_s: seconds of one step of one LoRA, all K at once and one by one, in turns in one process, "
        "medians; the first step of a run is not counted; ratio: the median over the rounds",
        "rank 8 on the attention layers, fp32, gradient clipping, AdamW; one by one is diffward.finetune.train",
        "difference: between the factors of the two after these steps, relative to their norm, the worst of all "
        "(AdamW divides by the gradient's size: where that is near zero, the order of a sum shows)",
    ])  # fmt: skip


def compare(
    base: str, device: str, k: int, batch: int, *, rounds: int, steps: int
) -> dict[str, Any]:
    from diffward.models.load import load_base

    denoiser = load_base(base, device=device)
    jobs = make_jobs(denoiser, k, batch, 1 + steps)
    many, one = _Many(denoiser, jobs), _OneByOne(denoiser, jobs)
    many()
    one()  # allocators and kernels warm
    many_s, one_s = interleaved(rounds, many, one)
    return {
        "k": k,
        "batch": batch,
        "device": device,
        "base": base_name(base),
        "rank": RANK,
        "steps": rounds * steps,
        "many_s": median(many_s),
        "one_s": median(one_s),
        "ratio": median(b / a for a, b in zip(many_s, one_s, strict=True)),
        "difference": max(difference(many.found[j], alone) for j, alone in one.found.items()),
    }


class _Many:
    """All jobs at once; called, gives the seconds of a step of one LoRA."""

    def __init__(self, denoiser: Denoiser, jobs: list[Job]) -> None:
        self.denoiser, self.jobs = denoiser, jobs
        self.found: list[LoraWeights | None] = []

    def __call__(self) -> float:
        from diffward.finetune.many import train_many

        stamps: list[float] = []
        results = train_many(
            self.denoiser, self.jobs, at_once=len(self.jobs),
            on_step=lambda step, adapter: stamps.append(time.monotonic()),
        )  # fmt: skip
        self.found = [result.weights for result in results]
        return _step(stamps) / len(self.jobs)


class _OneByOne:
    """Two of the jobs, the next ones with each call; gives the seconds of a step."""

    def __init__(self, denoiser: Denoiser, jobs: list[Job]) -> None:
        self.denoiser, self.jobs = denoiser, jobs
        self.turns: Iterator[int] = itertools.cycle(range(len(jobs)))
        self.found: dict[int, LoraWeights | None] = {}

    def __call__(self) -> float:
        from diffward.finetune import train
        from diffward.finetune.plain import Plain

        seconds = []
        for number in itertools.islice(self.turns, 2):
            stamps: list[float] = []
            job, stamp = self.jobs[number], _stamper(stamps)
            result = train(self.denoiser, job.features, Plain(), job.settings, on_step=stamp)
            self.denoiser.detach()
            self.found[number] = result.weights
            seconds.append(_step(stamps))
        return median(seconds)


def make_jobs(denoiser: Denoiser, k: int, batch: int, steps: int) -> list[Job]:
    """Jobs with pictures and seeds of their own."""
    import torch

    from diffward.data import load_pictures
    from diffward.finetune import Settings
    from diffward.finetune.many import Job
    from diffward.models.features import encode_pictures

    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder), PICTURES, [SEED, 9], size=denoiser.resolution)
        features = encode_pictures(denoiser, load_pictures(folder), cache=False)
    jobs = []
    for seed in range(k):
        rows = torch.randperm(PICTURES, generator=torch.Generator().manual_seed(seed))[:OWN]
        own = replace(
            features,
            latents=features.latents[rows],
            captions=[features.captions[row] for row in rows],
            names=[features.names[row] for row in rows],
            _caption_index=features._caption_index[rows],
        )
        settings = Settings(steps=steps, batch=batch, rank=RANK, alpha=RANK, seed=seed)
        jobs.append(Job(own, settings))
    return jobs


def difference(ours: LoraWeights | None, theirs: LoraWeights | None) -> float:
    """The largest relative difference of a factor, in norm."""
    assert ours is not None and theirs is not None
    return max(
        float((ours.modules[name].tensors[role] - tensor).norm() / tensor.norm())
        for name, module in theirs.modules.items()
        for role, tensor in module.tensors.items()
    )


def _stamper(stamps: list[float]) -> Callable[[int], None]:
    return lambda step: stamps.append(time.monotonic())


def _step(stamps: list[float]) -> float:
    return median(b - a for a, b in itertools.pairwise(stamps[1:]))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
