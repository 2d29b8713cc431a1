"""K LoRAs trained at once over one frozen base: one forward and backward pass a step for all.

Each has its own pictures, captions, seed, rank, alpha, learning rate, clipping and number of steps,
and comes out as `loop.train` would have made it: same draws, same start, same steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffward.errors import InputError, TrainingError
from diffward.finetune.checkpoint import Checkpoint
from diffward.finetune.finite import check_finite
from diffward.finetune.lion import Lion
from diffward.finetune.loop import (
    TrainResult,
    _check_moved,
    _fingerprint,
    _trainable,
)
from diffward.finetune.method import METHODS, Batch, Method
from diffward.finetune.sampler import Sampler
from diffward.finetune.settings import Settings
from diffward.finetune.stacked_adamw import StackedAdamW, clip_each
from diffward.models.stacked import StackedAdapter, stack
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


@dataclass
class Job:
    """One LoRA to train; `repeats`: how often each picture counts in an epoch."""

    features: Features
    settings: Settings
    repeats: list[int] | None = None

    @property
    def order(self) -> list[int]:
        """Rows of the pictures in one epoch, repeats counted."""
        repeats = self.repeats or [1] * len(self.features)
        return [row for row, times in enumerate(repeats) for _ in range(times)]

    @property
    def steps(self) -> int:
        return self.settings.total_steps(len(self.order))


def train_many(
    denoiser: Denoiser,
    jobs: Sequence[Job],
    *,
    method: Method | None = None,
    checkpoint: Path | None = None,
    at_once: int | None = None,
    on_step: Callable[[int, StackedAdapter], object] | None = None,
) -> list[TrainResult]:
    """Train one LoRA a job; the results in the jobs' order. The base is bare afterwards.

    Args:
        method: its loss of a sample must depend on that sample alone; plain fine-tuning by default.
        checkpoint: file to resume from and to save to; a number is added where there are several groups.
        at_once: LoRAs in one pass (`group_size` by default); more jobs go in several groups, the longest
            runs first.
        on_step: called with the finished steps of a group, 0 before the first, and its adapter, whose
            `labels` are the numbers of its jobs; a true answer ends the group's training.

    Raises:
        InputError: the jobs cannot be trained together, or the checkpoint is of other jobs.
        TrainingError: a loss is not finite (with job, step and pictures), or a `lora_B` does not move.
        KeyboardInterrupt: after saving the checkpoint.
    """
    if not jobs:
        return []
    _check_alike(jobs)
    at_once = group_size(denoiser, jobs[0].settings.batch) if at_once is None else at_once
    if at_once < 1:
        raise InputError(f"at_once {at_once}: must be at least 1")
    # Longest first: those still running are then always the first ones of their stack.
    order = sorted(range(len(jobs)), key=lambda j: -jobs[j].steps)
    groups = [order[i : i + at_once] for i in range(0, len(order), at_once)]
    method = METHODS["plain"].obj() if method is None else method
    results: dict[int, TrainResult] = {}
    for number, members in enumerate(groups):
        file = checkpoint
        if checkpoint and len(groups) > 1:
            file = checkpoint.with_name(f"{checkpoint.stem}-{number}{checkpoint.suffix}")
        name = f"train {len(members)} LoRAs"
        label = name if len(groups) == 1 else f"{name} (group {number + 1} of {len(groups)})"
        group = _Group(denoiser, {j: jobs[j] for j in members}, method)
        found = group.train(file, on_step or (lambda step, adapter: None), label)
        results |= zip(members, found, strict=True)
    return [results[j] for j in range(len(jobs))]


def group_size(denoiser: Denoiser, batch: int) -> int:
    """LoRAs to train at once: 128 samples in a pass of small latents, 8 of 64 x 64.

    More gains nothing: what is saved is the cost of a pass, and large latents have their fill anyway.
    """
    samples = min(128, 32768 // (denoiser.latent_shape[1] * denoiser.latent_shape[2]))
    return max(1, samples // batch)


class _Group:
    """Jobs in one stack, by number, longest first."""

    def __init__(self, denoiser: Denoiser, jobs: dict[int, Job], method: Method) -> None:
        self.denoiser, self.method = denoiser, method
        self.numbers, self.jobs = list(jobs), list(jobs.values())
        self.steps = [job.steps for job in self.jobs]

    def train(
        self, file: Path | None, on_step: Callable[[int, StackedAdapter], object], label: str
    ) -> list[TrainResult]:
        """Train all to their end; takes the adapter off again."""
        unet = self.denoiser.unet
        saving = any(job.settings.gradient_checkpointing for job in self.jobs)
        if saving:
            unet.enable_gradient_checkpointing()
        try:
            self.adapter = stack(self.denoiser, [self._start(job) for job in self.jobs])
            self.adapter.labels = self.numbers
            losses = self._run(file, on_step, label)
            return [
                TrainResult(
                    steps=len(losses[k]),
                    exposure=len(losses[k]) * job.settings.batch / len(job.order),
                    weights=self.adapter.weights(k),
                    losses=losses[k],
                )
                for k, job in enumerate(self.jobs)
            ]
        finally:
            if saving:
                unet.disable_gradient_checkpointing()
            self.denoiser.detach()

    def _start(self, job: Job) -> LoraWeights:
        """The factors that the job alone would start from."""
        _trainable(self.denoiser, job.settings)
        assert self.denoiser.trainable_adapter is not None
        return self.denoiser.trainable_adapter.weights()

    def _run(
        self, file: Path | None, on_step: Callable[[int, StackedAdapter], object], label: str
    ) -> list[list[float]]:
        """The steps; gives the losses of each job."""
        settings, total = [job.settings for job in self.jobs], self.steps[0]
        draws = [
            Sampler(self.denoiser, job.features, job.settings, job.order, 0, 1) for job in self.jobs
        ]
        parameters = self.adapter.parameters()
        kind = Lion if settings[0].optimizer == "lion" else StackedAdamW
        optimizer = kind(parameters, [s.lr for s in settings], [s.weight_decay for s in settings])
        saved = Checkpoint(file, parameters, optimizer, self._fingerprint())
        # Step by step; within a step, of the jobs that still run.
        start, losses = saved.load()
        every, done, whole = min(s.checkpoint_every for s in settings), start, True
        try:
            with progress(label, total, start) as bar:
                ended = start == 0 and on_step(0, self.adapter)
                for step in range(start, 0 if ended else total):
                    self.adapter.active = count = self._running(step)
                    found = self._backward([draw(step, 0) for draw in draws[:count]], step)
                    clip_each(parameters, [s.clip for s in settings[:count]])
                    optimizer.param_groups[0]["lr"] = [
                        job.settings.rate(step, job.steps) for job in self.jobs[:count]
                    ]
                    # Stopped between here and `done`, a step is half made and must not be saved.
                    whole = False
                    optimizer.step()
                    losses += found
                    done, whole = step + 1, True
                    optimizer.zero_grad(set_to_none=True)
                    if step == 0:
                        self._check_moved()
                    bar.advance(f"loss {sum(found) / count:.4f}")
                    if done % every == 0:
                        saved.save(done, losses)
                    if on_step(done, self.adapter):
                        break
        except KeyboardInterrupt:
            if whole:
                saved.save(done, losses)
            raise
        if done > start:
            saved.save(done, losses)
        return self._by_job(losses, done)

    def _running(self, step: int) -> int:
        return sum(steps > step for steps in self.steps)

    def _backward(self, batches: list[Batch], step: int) -> list[float]:
        """The gradient of each job's own mean loss; gives the losses."""
        parts = ([getattr(batch, field.name) for batch in batches] for field in fields(Batch))
        loss = self.method.loss(self.denoiser, Batch(*map(torch.cat, parts)))
        each = loss.view(len(batches), -1)
        values = each.detach().mean(dim=1).tolist()
        for k, value in enumerate(values):
            if not math.isfinite(value):
                with _named(self.numbers[k]):
                    check_finite(
                        each[k], batches[k].rows, self.jobs[k].features, f"step {step}", "--lr"
                    )
        each.mean(dim=1).sum().backward()
        return values

    def _check_moved(self) -> None:
        for k, number in enumerate(self.numbers):
            with _named(number):
                _check_moved([nn.Parameter(p.detach()[k]) for p in self.adapter.parameters()])

    def _by_job(self, losses: list[float], done: int) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in self.jobs]
        rest = iter(losses)
        for step in range(done):
            for k in range(self._running(step)):
                found[k].append(next(rest))
        return found

    def _fingerprint(self) -> dict[str, Any]:
        """What must not change between a run and its resumption, of all jobs."""
        told = [
            _fingerprint(
                job.settings, job.features, self.denoiser, self.method, job.order, job.steps
            )
            for job in self.jobs
        ]
        return {key: [one[key] for one in told] for key in told[0]} | {"jobs": self.numbers}


@contextlib.contextmanager
def _named(number: int) -> Iterator[None]:
    """Say which job an error is of."""
    try:
        yield
    except TrainingError as error:
        raise TrainingError(f"job {number}, {error}") from None


def _check_alike(jobs: Sequence[Job]) -> None:
    for number, job in enumerate(jobs):
        for option, value, wanted in (
            ("tune", job.settings.tune, "lora"),
            ("accumulate", job.settings.accumulate, 1),
            ("text-encoder", job.settings.text_encoder, False),
            ("track", job.settings.track, "none"),
            ("batch", job.settings.batch, jobs[0].settings.batch),
            ("optimizer", job.settings.optimizer, jobs[0].settings.optimizer),
            ("targets", job.settings.target_modules(), jobs[0].settings.target_modules()),
        ):
            if value != wanted:
                why = (
                    "as in job 0"
                    if option in ("batch", "optimizer", "targets")
                    else "to train many at once"
                )
                told = [",".join(v) if isinstance(v, list) else str(v) for v in (value, wanted)]
                raise InputError(f"job {number}: --{option} {told[0]}: must be {told[1]} {why}")
        if not job.order:
            raise InputError(f"job {number}: there is no picture to train on")
