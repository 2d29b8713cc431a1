"""A plain LoRA training step: ours, and a loop that encodes pictures and captions in every step.

The other loop does what diffusers' `train_text_to_image_lora.py` does in a step: it reads the
pictures from disk, resizes, encodes, trains. A second, kinder form of it (`memory`) keeps its pictures
decoded. Same model, pictures, targets, rank and batch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench._result import record
from bench._support import base_name, clocked, draw_folder, interleaved, measure, mini_base

if TYPE_CHECKING:
    from diffward.data import Pictures
    from diffward.models.denoiser import Denoiser

SEED = 0
BATCH, RANK, LR = 8, 8, 1e-3
PICTURES = 16
SD15 = "sd15 architecture"
ON_DISK = 256  # side of the pictures on disk, pixels
SD15_RESOLUTION = 128  # 16x16 latents: at 512 pixels a step of 8 takes minutes on two cores


def run(quick: bool = False) -> None:
    with mini_base() as base:
        rows = [compare(base, rounds=3, steps=3) if quick else compare(base, rounds=9, steps=15)]
        rows[0] |= peaks(base, 1 if quick else 3)
    if not quick:
        rows.append(compare(SD15, rounds=3, steps=2) | peaks(SD15, 1))
    record("train-step", rows, seeds=[SEED], quick=quick, notes=[
        "ours: diffward.finetune.train on cached latents and embeddings; loop: VAE, tokenizer and text encoder "
        "in every step, pictures of 256 pixels read from disk in every step as diffusers' example does; memory: the "
        "same loop with its pictures already decoded and resized; all through PEFT, AdamW, gradient clipping",
        "seconds of a step: rounds of some steps in turns in one process, medians; the first step of a round is "
        "not counted; encode_s: what ours pays once, for all pictures",
        "megabytes: peak resident memory of a process that does one of the two, from start to end, or only loads "
        "the model and the pictures",
        "sd15 architecture: random weights, full size, fp32",
    ])  # fmt: skip


def compare(base: str, rounds: int, steps: int) -> dict[str, Any]:
    with _prepared(base) as (denoiser, pictures):
        ours = _ours(denoiser, pictures)
        loop, memory = Loop(denoiser, pictures), Loop(denoiser, pictures, decoded=True)
        ours(1)
        loop(1)  # allocators and kernels warm
        encode = clocked(lambda: _features(denoiser, pictures))
        ours_s, loop_s, memory_s = interleaved(
            rounds,
            lambda: median(ours(1 + steps)[1:]),
            lambda: median(loop(1 + steps)[1:]),
            lambda: median(memory(1 + steps)[1:]),
        )
    return {
        "base": base if base == SD15 else base_name(base),
        "resolution": denoiser.resolution,
        "batch": BATCH,
        "rank": RANK,
        "steps": rounds * steps,
        "ours_s": median(ours_s),
        "loop_s": median(loop_s),
        "ratio": median(b / a for a, b in zip(ours_s, loop_s, strict=True)),
        "memory_s": median(memory_s),
        "ratio_memory": median(b / a for a, b in zip(ours_s, memory_s, strict=True)),
        "encode_s": encode,
    }


def peaks(base: str, runs: int) -> dict[str, float]:
    """Peak memory (MB) of each way in a process of its own."""

    def peak(way: str) -> float:
        return measure([sys.executable, "-m", "bench.train_step", way, base]).peak_mb

    ours, loop = interleaved(runs, lambda: peak("ours"), lambda: peak("loop"))
    return {"ours_mb": median(ours), "loop_mb": median(loop), "neither_mb": peak("neither")}


class Loop:
    """The straightforward way. Called with a number of steps, gives the seconds of each."""

    def __init__(self, denoiser: Denoiser, pictures: Pictures, decoded: bool = False) -> None:
        self.base, self.pictures, self.captions = denoiser, pictures, pictures.captions
        self.decoded = pictures.pixels(denoiser.resolution) if decoded else None

    def read(self, rows: list[int]) -> Any:
        """Pixels (n, 3, H, W) in [-1, 1]."""
        import numpy as np
        import torch

        if self.decoded is None:
            pixels = np.stack([self.pictures[i].load(self.base.resolution) for i in rows])
        else:
            pixels = self.decoded[rows]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def __call__(self, steps: int) -> list[float]:
        import torch
        from peft import LoraConfig

        from diffward.models.adapters import ATTENTION

        base, unet = self.base, self.base.unet
        base.detach()
        torch.manual_seed(SEED)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION)))
        unet.train()
        trained = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR)
        scaling = base.vae.config.scaling_factor
        seconds = []
        for _ in range(steps):
            began = time.monotonic()
            rows = torch.randperm(len(self.captions))[:BATCH].tolist()
            with torch.no_grad():
                posterior = base.vae.encode(self.read(rows).to(base.device)).latent_dist
                latents = posterior.sample() * scaling
                ids = base.tokenizer(
                    [self.captions[i] for i in rows], padding="max_length", truncation=True,
                    max_length=base.tokenizer.model_max_length, return_tensors="pt",
                ).input_ids  # fmt: skip
                text = base.text_encoder(ids.to(base.device)).last_hidden_state
            noise = torch.randn_like(latents)
            t = torch.randint(base.schedule.config.num_train_timesteps, (BATCH,), device=base.device)  # fmt: skip
            noisy = base.schedule.add_noise(latents, noise, t)
            wanted = (
                noise
                if base.prediction_type == "epsilon"
                else base.schedule.get_velocity(latents, noise, t)
            )
            loss = torch.nn.functional.mse_loss(unet(noisy, t, text).sample, wanted)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            seconds.append(time.monotonic() - began)
        unet.eval().unload_lora()
        return seconds


def _ours(denoiser: Denoiser, pictures: Pictures) -> Callable[[int], list[float]]:
    from diffward.finetune import Settings, train
    from diffward.finetune.plain import Plain

    features = _features(denoiser, pictures)

    def steps(count: int) -> list[float]:
        stamps: list[float] = []
        settings = Settings(steps=count, batch=BATCH, rank=RANK, alpha=RANK, lr=LR, seed=SEED)
        train(
            denoiser, features, Plain(), settings, on_step=lambda _: stamps.append(time.monotonic())
        )
        denoiser.detach()
        return [b - a for a, b in itertools.pairwise(stamps)]

    return steps


def _features(denoiser: Denoiser, pictures: Pictures) -> Any:
    from diffward.models.features import encode_pictures

    return encode_pictures(denoiser, pictures, cache=False)


@contextlib.contextmanager
def _prepared(base: str) -> Iterator[tuple[Denoiser, Pictures]]:
    from diffward.data import load_pictures
    from diffward.models.denoiser import Denoiser
    from diffward.models.load import load_base

    if base == SD15:
        from bench.make_sd15 import new_pipeline

        denoiser = Denoiser(new_pipeline(seed=SEED), SD15, resolution=SD15_RESOLUTION)
    else:
        denoiser = load_base(base, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder), PICTURES, [SEED, 7], size=ON_DISK)
        yield denoiser, load_pictures(folder)


def _alone() -> None:
    """One of the two in a process of its own, for `peaks`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["ours", "loop", "neither"])
    parser.add_argument("base")
    args = parser.parse_args()
    with _prepared(args.base) as (denoiser, pictures):
        if args.way != "neither":
            way = _ours(denoiser, pictures) if args.way == "ours" else Loop(denoiser, pictures)
            way(2 if args.base == SD15 else 10)


if __name__ == "__main__":
    _alone()
