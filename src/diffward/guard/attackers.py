"""Who fine-tunes a guarded base, and what they do with its mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from diffward.errors import InputError
from diffward.models.adapters import ATTENTION
from diffward.models.parameters import parameters_of
from diffward.registry import Registry

if TYPE_CHECKING:
    from diffward.finetune.settings import Settings
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


@dataclass
class AttackSettings:
    """What every attacker is told; the seed comes with the run."""

    steps: int = 400
    """optimizer steps"""
    batch: int = 8
    """pictures in a step"""
    lr: float = 1e-4
    """learning rate of AdamW where all weights train"""
    lora_lr: float = 1e-3
    """learning rate of AdamW where a LoRA trains"""
    rank: int = 8
    """rank of the LoRA"""
    schedule: str = "cosine"
    """constant or cosine"""
    prior_count: int = 32
    """dreambooth: class pictures that the guarded base draws"""
    prior_weight: float = 1.0
    """dreambooth: weight of their loss"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "prior_count"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise InputError(f"--attack.{option} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "lora_lr"):
            if not 0 < getattr(self, name) < 1e9:
                option = name.replace("_", "-")
                raise InputError(f"--attack.{option} {getattr(self, name)}: must be above 0")
        if not 0 <= self.prior_weight < 1e6:
            raise InputError(f"--attack.prior-weight {self.prior_weight}: must be 0 or above")
        if self.schedule not in ("constant", "cosine"):
            raise InputError(f"--attack.schedule {self.schedule}: choose constant or cosine")


@dataclass(frozen=True)
class Effort:
    """What an attack took.

    Attributes:
        trained: parameters that were trained.
        bytes: counted, not measured: all weights of the UNet, and a gradient and AdamW's two moments of
            what trains. Activations come on top.
        step_seconds: median over the steps but the first; None where nothing was trained.
        peak_bytes: measured on a GPU, activations included; None elsewhere.
    """

    steps: int
    trained: int
    bytes: int
    step_seconds: float | None
    peak_bytes: int | None = None


Attacker = Callable[..., Effort]
"""(denoiser, features, frozen, settings, seed, prior) -> Effort: fine-tunes the base in place.

`frozen` are the names that the mask freezes. A LoRA stays attached. `extra` of its entry says `kind`, the
procedure it is an instance of; `keeps`, whether it keeps to the mask; `prior`, whether it wants class pictures.
An attacker that does not keep to the mask is its kind with nothing frozen.
"""
ATTACKERS: Registry[Attacker] = Registry("attacker")


@ATTACKERS.register(
    "full", access="base, mask", cost="full fine-tuning", kind="full", keeps=True, prior=False
)
def full(
    denoiser: Denoiser, features: Features, frozen: Sequence[str], settings: AttackSettings, seed: int,
    prior: Features | None = None,
) -> Effort:  # fmt: skip
    """Full fine-tuning by a user who keeps to the mask."""
    return _train(denoiser, features, frozen, settings, seed, prior, tune="full", lr=settings.lr)


@ATTACKERS.register(
    "lora", paper="Hu et al. 2022", access="base", cost="a LoRA on all attention", kind="lora", keeps=False,
    prior=False,
)  # fmt: skip
def lora(
    denoiser: Denoiser, features: Features, frozen: Sequence[str], settings: AttackSettings, seed: int,
    prior: Features | None = None,
) -> Effort:  # fmt: skip
    """An ordinary LoRA trainer, which does not know of the mask."""
    return lora_kept(denoiser, features, (), settings, seed, prior)


@ATTACKERS.register(
    "lora-kept", paper="Hu et al. 2022", access="base, mask", cost="a LoRA on the attention that the mask leaves",
    kind="lora", keeps=True, prior=False,
)  # fmt: skip
def lora_kept(
    denoiser: Denoiser, features: Features, frozen: Sequence[str], settings: AttackSettings, seed: int,
    prior: Features | None = None,
) -> Effort:  # fmt: skip
    """A LoRA trainer that leaves frozen modules out; where the mask leaves no attention, nothing is trained."""
    wanted = tuple(f".{module}.weight" for module in ATTENTION)
    own = [name for name in parameters_of(denoiser.unet) if name.endswith(wanted)]
    if own and set(own) <= set(frozen):
        return nobody(denoiser, features, frozen, settings, seed)
    return _train(
        denoiser, features, frozen, settings, seed, prior, tune="lora", lr=settings.lora_lr, rank=settings.rank,
        alpha=float(settings.rank), targets="attention",
    )  # fmt: skip


@ATTACKERS.register(
    "dreambooth", paper="Ruiz et al. 2023 (arXiv 2208.12242)", access="base, mask, a word for the class",
    cost="full fine-tuning on pictures and class pictures", kind="dreambooth", keeps=True, prior=True,
)  # fmt: skip
def dreambooth(
    denoiser: Denoiser, features: Features, frozen: Sequence[str], settings: AttackSettings, seed: int,
    prior: Features | None = None,
) -> Effort:  # fmt: skip
    """DreamBooth by a user who keeps to the mask: full fine-tuning with class pictures beside."""
    if prior is None:
        raise InputError("dreambooth needs class pictures: give the domain a class prompt")
    return full(denoiser, features, frozen, settings, seed, prior)


@ATTACKERS.register(
    "unfreeze", access="base", cost="full fine-tuning", kind="full", keeps=False, prior=False
)
def unfreeze(
    denoiser: Denoiser, features: Features, frozen: Sequence[str], settings: AttackSettings, seed: int,
    prior: Features | None = None,
) -> Effort:  # fmt: skip
    """Full fine-tuning by an attacker who ignores the mask."""
    return full(denoiser, features, (), settings, seed, prior)


@ATTACKERS.register("nobody", access="base", cost="none", kind="nobody", keeps=False, prior=False)
def nobody(
    denoiser: Denoiser, features: Features, frozen: Sequence[str], settings: AttackSettings, seed: int,
    prior: Features | None = None,
) -> Effort:  # fmt: skip
    """No fine-tuning: what the guarded base gives as it is."""
    held = sum(p.numel() * p.element_size() for p in denoiser.unet.parameters())
    return Effort(0, 0, held, None)


def _train(
    denoiser: Denoiser, features: Features, frozen: Sequence[str], settings: AttackSettings, seed: int,
    prior: Features | None, **given: Any,
) -> Effort:  # fmt: skip
    from diffward.finetune import Settings, train
    from diffward.finetune.plain import Plain

    run: Settings = Settings(
        steps=settings.steps, batch=settings.batch, schedule=settings.schedule, seed=seed,
        prior_weight=settings.prior_weight, gradient_checkpointing=settings.gradient_checkpointing, **given,
    )  # fmt: skip
    marks: list[float] = []
    cuda = denoiser.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(denoiser.device)
    train(
        denoiser, features, Plain(), run, prior=prior, frozen=list(frozen),
        on_step=lambda step: marks.append(time.perf_counter()),
        rate_option="--attack.lr" if run.tune == "full" else "--attack.lora-lr",
    )  # fmt: skip
    every = list(denoiser.unet.parameters())
    trained = [p for p in every if p.requires_grad]
    held, moved = (sum(p.numel() * p.element_size() for p in some) for some in (every, trained))
    taken = [b - a for a, b in pairwise(marks)]
    return Effort(
        settings.steps,
        sum(p.numel() for p in trained),
        held + 3 * moved,
        _median(taken[1:] or taken),
        torch.cuda.max_memory_allocated(denoiser.device) if cuda else None,
    )


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
