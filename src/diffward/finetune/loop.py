"""The training loop that every method shares, on accelerate.

All randomness comes from (seed, step): a resumed run gives the same weights as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffward.errors import InputError, TrainingError
from diffward.finetune.adamw import adamw
from diffward.finetune.checkpoint import Checkpoint
from diffward.finetune.finite import check_finite
from diffward.finetune.gauge import Reading, Watch
from diffward.finetune.lion import Lion
from diffward.finetune.method import METHODS, Auxiliary, Method, Run, name_of
from diffward.finetune.sampler import Sampler, seed_of
from diffward.finetune.settings import Settings, identity_of
from diffward.models.parameters import hashes, parameters_of, tensor_hash
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


@dataclass
class TrainResult:
    """What a run leaves: the adapter (None after full fine-tuning) and the loss of each step.

    `steps` were made; the weights are those after `kept_at` of them, if the method or the gauge chose.
    `facts` may stand in the model file.
    """

    steps: int
    exposure: float
    weights: LoraWeights | None
    losses: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    kept_at: int | None = None
    facts: dict[str, str] = field(default_factory=dict)


def train(
    denoiser: Denoiser,
    features: Features,
    method: Method,
    settings: Settings,
    *,
    auxiliary: Auxiliary | None = None,
    prior: Features | None = None,
    checkpoint: Path | None = None,
    repeats: list[int] | None = None,
    groups: Sequence[int] | None = None,
    frozen: Collection[str] = (),
    on_start: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    rate_option: str = "--lr",
) -> TrainResult:
    """Fine-tune `denoiser` in place; a LoRA stays attached to it.

    Args:
        features: encoded pictures and captions.
        auxiliary: pictures that the method or the gauge may compare.
        prior: class pictures whose plain loss is added, `settings.prior_weight` times (DreamBooth, Ruiz
            et al. 2023).
        checkpoint: file to resume from and to save to; None keeps nothing.
        repeats: how often each picture counts in an epoch (kohya's repeat folders).
        groups: near-duplicates among the pictures share a number, where a method has to keep them together.
        frozen: parameters of the UNet that stay as they are; a LoRA leaves out their modules.
        on_start: called with the step the run starts or resumes from, once the checkpoint is accepted.
        on_step: called with the number of finished steps, 0 before the first.
        rate_option: what the learning rate is called where the run was asked for; errors name it.

    Raises:
        InputError: the method cannot work with these settings or pictures, or the checkpoint is another run's.
        TrainingError: the loss is not finite (with step and pictures), or `lora_B` does not move.
        KeyboardInterrupt: after saving the checkpoint.
    """
    from accelerate import Accelerator

    repeats = repeats or [1] * len(features)
    order = [
        row for row, times in zip(range(len(features)), repeats, strict=True) for _ in range(times)
    ]
    total = settings.total_steps(len(order))
    check_options(method, settings)
    _check_method(method, settings, auxiliary, prior)
    told = _fingerprint(
        settings, features, denoiser, method, order, total, auxiliary, prior, frozen
    )
    folder = checkpoint.parent if checkpoint else None
    method.precede(denoiser, features, settings, order, folder, groups)
    parameters = _trainable(denoiser, settings, frozen)
    before = hashes(parameters_of(denoiser.unet), frozen)
    if settings.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    accelerator = Accelerator(
        cpu=denoiser.device.type == "cpu",
        mixed_precision="no",  # the denoiser autocasts; factors and loss stay in fp32
        log_with=settings.track if settings.track != "none" else None,
        project_dir=str(checkpoint.parent) if checkpoint else None,
    )
    bare = denoiser.unet
    run = Run(denoiser, features, settings, parameters, order, total, auxiliary)
    try:
        method.start(run)
        watch = Watch(run, method)
        optimizer = method.prepare(_optimizer(parameters, settings))
        saved = Checkpoint(
            checkpoint, parameters, optimizer, told, {"method": method, "watch": watch}
        )
        start, losses = saved.load()
        if on_start:
            on_start(start)
        if accelerator.num_processes > 1:
            denoiser.unet, optimizer = accelerator.prepare(denoiser.unet, optimizer)
        if settings.track != "none":
            accelerator.init_trackers("logs")
        steps = _Steps(run, method, optimizer, accelerator, prior, rate_option)
        on_step = on_step or (lambda step: None)
        whole, done = True, start
        try:
            with progress("train", total, start) as bar:
                if start == 0:
                    on_step(0)
                while not watch.look(done) and done < total:
                    loss = steps.gradient(done, losses)
                    # Stopped between here and the new loss, a step is half made and must not be saved.
                    whole = False
                    steps.step(done)
                    losses.append(loss)
                    done, whole = done + 1, True
                    if done == 1 and settings.tune == "lora":
                        _check_moved(parameters)
                    if settings.track != "none":
                        accelerator.log(_logged(loss, settings.rate(done - 1, total), watch), done)
                    recent = f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}"
                    bar.advance(", ".join(filter(None, [recent, method.told(), watch.told()])))
                    if done % settings.checkpoint_every == 0 and accelerator.is_main_process:
                        saved.save(done, losses)
                    on_step(done)
        except KeyboardInterrupt:
            if whole:
                saved.save(done, losses)
            raise
        if settings.track != "none":
            accelerator.end_training()
        if done > start and accelerator.is_main_process:
            saved.save(done, losses)
        watch.restore()
        _check_frozen(denoiser, before)
    finally:
        method.finish()
        denoiser.unet = bare
        if settings.gradient_checkpointing:
            denoiser.unet.disable_gradient_checkpointing()
    adapter = denoiser.trainable_adapter
    shown = settings.batch * settings.accumulate * accelerator.num_processes / len(order)
    return TrainResult(
        done, (done if watch.kept_at is None else watch.kept_at) * shown, adapter.weights() if adapter else None,
        losses, watch.readings, watch.kept_at, method.facts(),
    )  # fmt: skip


class _Steps:
    """The two halves of a step: its gradient, and the move."""

    def __init__(
        self, run: Run, method: Method, optimizer: torch.optim.Optimizer, accelerator: Any,
        prior: Features | None, rate_option: str,
    ) -> None:  # fmt: skip
        self.run, self.method, self.optimizer = run, method, optimizer
        self.accelerator, self.rate_option = accelerator, rate_option
        settings = run.settings
        place = accelerator.process_index, accelerator.num_processes
        self.draw = Sampler(run.denoiser, run.features, settings, run.order, *place)
        self.draw_prior = None
        if prior is not None:
            other = replace(settings, seed=seed_of(settings.seed, 0, 1 << 22, 0))
            self.draw_prior = Sampler(run.denoiser, prior, other, list(range(len(prior))), *place)

    def gradient(self, step: int, losses: list[float]) -> float:
        """Accumulate the gradient of a step; gives its mean loss (the last one's if it drew no picture)."""
        settings, denoiser = self.run.settings, self.run.denoiser
        value, parts = 0.0, 0
        passes = self.method.passes(step) or settings.accumulate
        for micro in range(passes):
            rows = self.method.rows(step, micro)
            if rows is not None and not len(rows):
                continue
            batch = self.draw(step, micro, rows)
            loss = self.method.loss(denoiser, batch)
            check_finite(loss, batch.rows, self.run.features, f"step {step}", self.rate_option)
            goal = loss.mean()
            if self.draw_prior:
                other = self.draw_prior(step, micro)
                errors = denoiser.errors(other.latents, other.t, other.eps, other.conditioning)
                goal = goal + settings.prior_weight * errors.mean()
            self.accelerator.backward(goal / passes)
            value, parts = value + float(loss.detach().mean()), parts + 1
        return value / parts if parts else (losses[-1] if losses else 0.0)

    def step(self, step: int) -> None:
        settings = self.run.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(step, self.run.total)
        if settings.clip and not self.method.own_clipping:
            self.accelerator.clip_grad_norm_(self.run.parameters, settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(step)


def check_options(method: Method, settings: Settings) -> None:
    """Refuse what the method would not look at: who gives `--dp.epsilon` must not believe in a bound that is none.

    Raises:
        InputError: names the option, and the methods that it is for.
    """
    given = {
        f"{group}.{name}": value for group in ("privacy", "dp") for name, value in vars(getattr(settings, group)).items()
    } | {"gauge.patience": settings.gauge.patience}  # fmt: skip
    usual, read = Settings(), method.reads(settings)
    for option, value in given.items():
        group, name = option.split(".")
        if option in read or value == getattr(getattr(usual, group), name):
            continue
        able = [known.name for known in METHODS if option in known.obj.options]
        hint = f"use {' or '.join(able)}"
        if name_of(method) in able:
            hint = "drop --privacy.paper"
        raise InputError(
            f"--{option.replace('_', '-')} {value}: method {name_of(method)} does not look at it; leave it out, or {hint}"
        )
    if method.own_clipping and settings.clip != usual.clip:
        raise InputError(
            f"--clip {settings.clip:g}: method {name_of(method)} bounds the gradient of each picture; give --dp.clip"
        )


def _check_method(
    method: Method, settings: Settings, auxiliary: Auxiliary | None, prior: Features | None
) -> None:
    if (method.needs_auxiliary or method.needs_gauge) and auxiliary is None:
        raise InputError(
            f"method {name_of(method)} compares members with pictures that do not train; hold "
            "some out with --holdout, or give others with --holdout-data"
        )
    if method.own_clipping and prior is not None:
        raise InputError(
            f"method {name_of(method)} bounds the gradient of each picture: leave the class pictures out"
        )
    if method.needs_auxiliary and settings.text_encoder and settings.drop_caption:
        raise InputError("--text-encoder with --drop-caption: not with this method; leave one out")


def _logged(loss: float, rate: float, watch: Watch) -> dict[str, float]:
    values = {"loss": loss, "lr": rate}
    if watch.readings:
        last = watch.readings[-1]
        values |= {"validation_loss": last.validation_loss, "member_auc": last.auc}
    return values


def _trainable(
    denoiser: Denoiser, settings: Settings, frozen: Collection[str] = ()
) -> list[nn.Parameter]:
    """What trains. Frozen parameters are no part of it: no gradient, no moments, no weight decay."""
    denoiser.detach()
    own = parameters_of(denoiser.unet)
    if unknown := [name for name in frozen if name not in own]:
        raise InputError(
            f"base {denoiser.name} has no tensor {unknown[0]} to freeze; the mask is for another model"
        )
    denoiser.unet.requires_grad_(False)
    if settings.tune == "full":
        trained = [p for name, p in own.items() if name not in frozen]
        if settings.text_encoder:
            trained += denoiser.text_encoder.parameters()
        for parameter in trained:
            parameter.requires_grad_(True)
        return trained
    # The factors start from the seed alone, whatever ran before in this process.
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(settings.seed, 0, 1 << 21, 0))
        adapter = denoiser.inject(
            settings.rank,
            settings.alpha,
            settings.target_modules(),
            text_encoder=settings.text_encoder,
            init=settings.init == "uniform" or settings.init,
            exclude=[name.removesuffix(".weight") for name in frozen if name.endswith(".weight")],
        )
    return adapter.parameters()


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "lion":
        return Lion(parameters, settings.lr, settings.weight_decay)
    return adamw(parameters, settings.lr, settings.weight_decay)


def _check_moved(parameters: list[nn.Parameter]) -> None:
    if not any(bool(b.detach().any()) for b in parameters[1::2]):
        raise TrainingError("step 0: lora_B did not move; the adapter is not being trained")


def _check_frozen(denoiser: Denoiser, before: dict[str, str]) -> None:
    now = parameters_of(denoiser.unet)
    if moved := [name for name, was in before.items() if tensor_hash(now[name]) != was]:
        raise TrainingError(
            f"{moved[0]} is frozen and has moved ({len(moved)} such); the model was not saved"
        )


def _fingerprint(
    settings: Settings,
    features: Features,
    denoiser: Denoiser,
    method: Method,
    order: list[int],
    total: int,
    auxiliary: Auxiliary | None = None,
    prior: Features | None = None,
    frozen: Collection[str] = (),
) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    told: dict[str, Any] = {}
    for key, value in identity_of(settings).items():
        if key not in ("checkpoint_every", "sample_every", "sample_prompts", "track"):
            told |= (
                {f"{key}.{k}": v for k, v in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
    if told["privacy.weight"] is None:
        told["privacy.weight"] = getattr(method, "default_weight", None)
    if auxiliary:
        rows = f"{auxiliary.members.tolist()}{auxiliary.gauge_members.tolist()}"
        told["holdout"] = auxiliary.non_members.digest(rows) + auxiliary.validation.digest()
    if prior is not None:
        told["prior pictures"] = prior.digest()
    if frozen:
        told["mask"] = sorted(frozen)
    return {
        **told,
        "total": total,
        "data": features.digest(str(order)),
        "base": denoiser.unet_identity,
        "precision": str(denoiser.compute_dtype),
        "method": type(method).__name__,
    }
