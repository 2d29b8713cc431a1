"""The training loop that every method shares, on accelerate.

All randomness comes from (seed, step): a resumed run gives the same weights as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffward.errors import TrainingError
from diffward.finetune.checkpoint import Checkpoint
from diffward.finetune.method import Batch, Method
from diffward.finetune.settings import Settings
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


@dataclass
class TrainResult:
    """What a run leaves: the adapter (None after full fine-tuning) and the loss of each step."""

    steps: int
    exposure: float
    weights: LoraWeights | None
    losses: list[float] = field(default_factory=list)


def train(
    denoiser: Denoiser,
    features: Features,
    method: Method,
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    repeats: list[int] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Fine-tune `denoiser` in place; a LoRA stays attached to it.

    Args:
        features: encoded pictures and captions.
        checkpoint: file to resume from and to save to; None keeps nothing.
        repeats: how often each picture counts in an epoch (kohya's repeat folders).
        on_start: called with the step the run starts or resumes from, once the checkpoint is accepted.
        on_step: called with the number of finished steps, 0 before the first.

    Raises:
        TrainingError: the loss is not finite (with step and pictures), or `lora_B` does not move.
        KeyboardInterrupt: after saving the checkpoint.
    """
    from accelerate import Accelerator

    repeats = repeats or [1] * len(features)
    order = [
        row for row, times in zip(range(len(features)), repeats, strict=True) for _ in range(times)
    ]
    total = settings.total_steps(len(order))
    parameters = _trainable(denoiser, settings)
    if settings.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    accelerator = Accelerator(
        cpu=denoiser.device.type == "cpu",
        mixed_precision="no",  # the denoiser autocasts; factors and loss stay in fp32
        log_with=settings.track if settings.track != "none" else None,
        project_dir=str(checkpoint.parent) if checkpoint else None,
    )
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, weight_decay=settings.weight_decay, foreach=True
    )
    run = _fingerprint(settings, features, denoiser, method, order, total)
    saved = Checkpoint(checkpoint, parameters, optimizer, run)
    start, losses = saved.load()
    if on_start:
        on_start(start)
    bare = denoiser.unet
    if accelerator.num_processes > 1:
        denoiser.unet, optimizer = accelerator.prepare(denoiser.unet, optimizer)
    if settings.track != "none":
        accelerator.init_trackers("logs")
    draw = Sampler(
        denoiser, features, settings, order, accelerator.process_index, accelerator.num_processes
    )
    on_step = on_step or (lambda step: None)
    whole = True
    try:
        with progress("train", total, start) as bar:
            if start == 0:
                on_step(0)
            for step in range(start, total):
                for group in optimizer.param_groups:
                    group["lr"] = settings.rate(step, total)
                value = 0.0
                for micro in range(settings.accumulate):
                    batch = draw(step, micro)
                    loss = method.loss(denoiser, batch)
                    _check_finite(loss, step, batch, features)
                    accelerator.backward(loss.mean() / settings.accumulate)
                    value += float(loss.detach().mean()) / settings.accumulate
                if settings.clip:
                    accelerator.clip_grad_norm_(parameters, settings.clip)
                # Stopped between here and the new loss, a step is half made and must not be saved.
                whole = False
                optimizer.step()
                losses.append(value)
                whole = True
                optimizer.zero_grad(set_to_none=True)
                if step == 0 and settings.tune == "lora":
                    _check_moved(parameters)
                if settings.track != "none":
                    accelerator.log({"loss": value, "lr": settings.rate(step, total)}, step=step)
                bar.advance(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
                if (step + 1) % settings.checkpoint_every == 0 and accelerator.is_main_process:
                    saved.save(step + 1, losses)
                on_step(step + 1)
    except KeyboardInterrupt:
        if whole:
            saved.save(len(losses), losses)
        raise
    finally:
        denoiser.unet = bare
        if settings.gradient_checkpointing:
            denoiser.unet.disable_gradient_checkpointing()
    if settings.track != "none":
        accelerator.end_training()
    if total > start and accelerator.is_main_process:
        saved.save(total, losses)
    adapter = denoiser.trainable_adapter
    exposure = total * settings.batch * settings.accumulate * accelerator.num_processes / len(order)
    return TrainResult(total, exposure, adapter.weights() if adapter else None, losses)


class Sampler:
    """Draws the batch of a step: pictures in a fresh order each epoch, uniform t, normal noise."""

    def __init__(
        self,
        denoiser: Denoiser,
        features: Features,
        settings: Settings,
        order: list[int],
        rank: int,
        world: int,
    ) -> None:
        self.denoiser, self.features, self.settings = denoiser, features, settings
        self.order, self.rank, self.world = torch.tensor(order), rank, world
        self.timesteps = denoiser.schedule.config.num_train_timesteps
        adapts_text = settings.text_encoder
        self._ids = denoiser.tokenize(features.captions) if adapts_text else None
        drops = settings.drop_caption > 0
        self._null_ids = denoiser.tokenize([""]) if drops else None
        self._null = denoiser.condition([""]) if drops and not adapts_text else None
        self._epoch: tuple[int, Tensor] = (-1, self.order)

    def __call__(self, step: int, micro: int) -> Batch:
        size, device = self.settings.batch, self.denoiser.device
        first = ((step * self.settings.accumulate + micro) * self.world + self.rank) * size
        rows = torch.stack([self._row(first + i) for i in range(size)])
        generator = torch.Generator().manual_seed(_seed(self.settings.seed, step, micro, self.rank))
        latents = self.features.latents[rows.to(device)]
        t = torch.randint(self.timesteps, (size,), generator=generator).to(device)
        eps = torch.randn(latents.shape, generator=generator).to(device)
        dropped = torch.rand(size, generator=generator) < self.settings.drop_caption
        return Batch(latents, self._conditioning(rows.to(device), dropped.to(device)), t, eps, rows)

    def _row(self, position: int) -> Tensor:
        epoch, place = divmod(position, len(self.order))
        if epoch != self._epoch[0]:
            generator = torch.Generator().manual_seed(_seed(self.settings.seed, epoch, 1 << 20, 0))
            self._epoch = (epoch, self.order[torch.randperm(len(self.order), generator=generator)])
        return self._epoch[1][place]

    def _conditioning(self, rows: Tensor, dropped: Tensor) -> Tensor:
        if self._ids is None:
            conditioning = self.features.conditioning(rows)
            if self._null is not None:
                conditioning = torch.where(dropped[:, None, None], self._null, conditioning)
            return conditioning
        ids = self._ids[rows]
        if self._null_ids is not None:
            ids = torch.where(dropped[:, None], self._null_ids, ids)
        return self.denoiser.embed(ids)


def _trainable(denoiser: Denoiser, settings: Settings) -> list[nn.Parameter]:
    if settings.tune == "full":
        denoiser.detach()
        trained = [denoiser.unet] + ([denoiser.text_encoder] if settings.text_encoder else [])
        return [p.requires_grad_(True) for module in trained for p in module.parameters()]
    # The factors start from the seed alone, whatever ran before in this process.
    with torch.random.fork_rng():
        torch.manual_seed(_seed(settings.seed, 0, 1 << 21, 0))
        adapter = denoiser.inject(
            settings.rank,
            settings.alpha,
            settings.target_modules(),
            text_encoder=settings.text_encoder,
        )
    return adapter.parameters()


def _seed(seed: int, a: int, b: int, c: int) -> int:
    """One seed from several numbers (a splitmix-like hash: neighbours must not be alike)."""
    value = seed & (2**63 - 1)
    for part in (a, b, c):
        value = (
            value ^ (part + 0x9E3779B97F4A7C15 + (value << 6) + (value >> 2))
        ) * 0xBF58476D1CE4E5B9
        value &= 2**63 - 1
    return value


def _check_finite(loss: Tensor, step: int, batch: Batch, features: Features) -> None:
    if torch.isfinite(loss).all():
        return
    bad = [
        features.names[int(r)]
        for r, v in zip(batch.rows, loss.detach(), strict=True)
        if not math.isfinite(v)
    ]
    raise TrainingError(
        f"step {step}: the loss is not finite for {', '.join(bad)}; lower --lr, or look at these pictures"
    )


def _check_moved(parameters: list[nn.Parameter]) -> None:
    if not any(bool(b.detach().any()) for b in parameters[1::2]):
        raise TrainingError("step 0: lora_B did not move; the adapter is not being trained")


def _fingerprint(
    settings: Settings,
    features: Features,
    denoiser: Denoiser,
    method: Method,
    order: list[int],
    total: int,
) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    import hashlib
    from dataclasses import asdict

    told = {
        k: v
        for k, v in asdict(settings).items()
        if k not in ("checkpoint_every", "sample_every", "sample_prompts", "track")
    }
    data = hashlib.sha256(features.latents.float().cpu().numpy().tobytes())
    data.update("\0".join(features.captions).encode())
    data.update(str(order).encode())
    return {
        **told,
        "total": total,
        "data": data.hexdigest(),
        "base": denoiser.unet_identity,
        "precision": str(denoiser.compute_dtype),
        "method": type(method).__name__,
    }
