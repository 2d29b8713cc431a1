"""A resumable training stage: a step function called with its number, and a checkpoint beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffward.errors import InputError, TrainingError
from diffward.files import atomic_path


def run_stage(
    name: str,
    steps: int,
    step: Callable[[int], dict[str, float]],
    state: dict[str, Any],
    checkpoint: Path,
    *,
    every: int = 500,
    on_log: Callable[[str], None] = print,
    run: str = "",
) -> None:
    """Call `step(0) … step(steps - 1)`, saving the `state_dict` of each object of `state`.

    A step must draw all its randomness from its number: then a resumed stage gives the same weights
    as an uninterrupted one.

    Args:
        run: what the result depends on; a checkpoint of another run is refused.

    Raises:
        InputError: the checkpoint is another run's, or unreadable.
        TrainingError: a value that a step gives is not finite.
    """
    start = 0
    if checkpoint.exists():
        try:
            saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
            other = saved.get("run", "") != run
        except Exception as error:
            raise InputError(f"{checkpoint}: cannot be read; delete it to start anew") from error
        if other:
            raise InputError(
                f"{checkpoint}: is of a run with other settings or data; choose another folder, or delete it"
            )
        for key, holder in state.items():
            holder.load_state_dict(saved[key])
        start = saved["step"]
        on_log(f"{name}: resumed at step {start} of {steps}")
    began, seen = time.monotonic(), 0
    means: dict[str, float] = {}
    for number in range(start, steps):
        for key, value in step(number).items():
            if not math.isfinite(value):
                raise TrainingError(f"{name}: step {number}: {key} is not finite; lower the rate")
            means[key] = means.get(key, 0.0) + value
        seen += 1
        if (number + 1) % 50 == 0 or number + 1 == steps:
            pace = (time.monotonic() - began) / (number + 1 - start)
            told = ", ".join(f"{k} {v / seen:.4f}" for k, v in means.items())
            left = pace * (steps - number - 1) / 60
            on_log(
                f"{name}: step {number + 1}/{steps}, {told}, {pace:.3f} s a step, {left:.0f} min left"
            )
            means, seen = {}, 0
        if (number + 1) % every == 0 or number + 1 == steps:
            with atomic_path(checkpoint) as temporary:
                torch.save(
                    {
                        "step": number + 1,
                        "run": run,
                        **{k: v.state_dict() for k, v in state.items()},
                    },
                    temporary,
                )


def cosine(step: int, steps: int, *, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (
        1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    )


def trapezoid(step: int, steps: int, *, warmup: int = 300, decay: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, constant, and linear down over the last `decay` of it.

    Until the decay begins a run can still be made longer or shorter and resumed exactly.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def rounds(step: int, length: int) -> float:
    """Learning-rate factor: a trapezoid of `length` steps, again and again (warm restarts).

    A finished run can so be trained further by a round, and resumed exactly.
    """
    return trapezoid(step % length, length)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
