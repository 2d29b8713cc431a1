"""What learning a guard is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffward.errors import InputError
from diffward.guard.budget import UNITS

OPTIMIZERS = ("adamw", "factored", "sgd")
PAIRINGS = ("last-to-padding", "last-token")
TECHNIQUES = ("replace", "tensor")
VARIANTS = ("lora", "full")


@dataclass
class UceOptions:
    """The closed-form edit: uce."""

    pairing: str = "last-to-padding"
    """which tokens of a concept meet which of the guide: last-to-padding (from the last word's to the end of the
    padding) or last-token (that one alone)"""
    technique: str = "replace"
    """replace (what the guide gives) or tensor (that, less its part along what the concept gave)"""
    preserve: list[str] = field(default_factory=list)
    """texts that shall give what they gave"""
    preserve_empty: bool | None = None
    """preserve the empty caption too; without it: yes with last-to-padding, no with last-token"""
    lam: float = 0.5
    """weight of the distance from the base's matrices"""
    erase_scale: float = 1.0
    """weight of the concepts"""
    preserve_scale: float | None = None
    """weight of what is preserved; without it one over the number of those texts, at least 0.1, with
    last-to-padding, and 1 with last-token"""

    def __post_init__(self) -> None:
        _choice("uce.pairing", self.pairing, PAIRINGS)
        _choice("uce.technique", self.technique, TECHNIQUES)
        _above("uce.lam", self.lam)
        _above("uce.erase-scale", self.erase_scale)
        if self.preserve_scale is not None and not 0 <= self.preserve_scale < 1e6:
            raise InputError(f"--uce.preserve-scale {self.preserve_scale}: must be 0 or above")

    @property
    def keeps_empty(self) -> bool:
        return (
            self.pairing == "last-to-padding"
            if self.preserve_empty is None
            else self.preserve_empty
        )


@dataclass
class ImmaOptions:
    """Immunisation against a simulated adaptation: imma."""

    variant: str = "lora"
    """what the simulated user trains: lora (on the attention), or full (all weights)"""
    steps: int = 1000
    """steps in all, the user's and the publisher's"""
    inner: int = 1
    """steps of the user between those of the publisher"""
    outer: int = 1
    """steps of the publisher between those of the user"""
    inner_lr: float | None = None
    """learning rate of the user; without it 1e-4 (lora), 5e-6 (full)"""
    outer_lr: float | None = None
    """learning rate of the publisher; without it 1e-5 (lora), 2e-5 (full)"""
    batch: int = 1
    """pictures in a step"""
    rank: int = 4
    """rank of the simulated LoRA"""
    reinitialize: bool = False
    """lora: the user starts anew after every round of inner and outer steps"""
    weight_decay: float = 1e-2
    clip: float = 1.0
    """largest gradient norm; 0 for none"""
    limit: float = 100.0
    """stop when the loss passes this many times the base's, for then the base is broken; 0: never"""
    checkpoint_every: int = 100
    """steps between checkpoints; the run resumes from the last one"""

    def __post_init__(self) -> None:
        _choice("imma.variant", self.variant, VARIANTS)
        for name in ("steps", "inner", "outer", "batch", "rank", "checkpoint_every"):
            _at_least_one(f"imma.{name}", getattr(self, name))
        for name in ("inner_lr", "outer_lr"):
            if getattr(self, name) is not None:
                _above(f"imma.{name}", getattr(self, name))
        for name in ("weight_decay", "clip", "limit"):
            if not 0 <= getattr(self, name) < 1e9:
                raise InputError(
                    f"--imma.{name.replace('_', '-')} {getattr(self, name)}: must be 0 or above"
                )
        if self.steps < self.inner + self.outer:
            raise InputError(
                f"--imma.steps {self.steps}: must be at least one round, {self.inner + self.outer} steps"
            )
        if self.reinitialize and self.variant == "full":
            raise InputError(
                "--imma.reinitialize: only with --imma.variant lora; what a full fine-tuning moves is the base itself"
            )

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates (inner, outer)."""
        inner, outer = (1e-4, 1e-5) if self.variant == "lora" else (5e-6, 2e-5)
        return self.inner_lr or inner, self.outer_lr or outer


@dataclass
class GuardSettings:
    """Settings of `guard learn`; names are those of the command line."""

    budget: float = 0.3
    """share to freeze"""
    by: str = "parameters"
    """what the budget counts: tensors, parameters or cost (of training them)"""
    cost_weight: float = 0.0
    """how much a tensor's training cost speaks for freezing it, beside what the method found (both standardised)"""
    tune_steps: int = 400
    """steps of the full fine-tuning on both domains that comes first (theta_ft)"""
    updates: int = 60
    """updates of the mask"""
    interval: int = 4
    """steps of the simulated user between two updates of the mask"""
    batch: int = 16
    """pictures in a step, half of either domain"""
    user_lr: float = 1e-4
    """learning rate of the simulated user, and of the fine-tuning that comes first"""
    user_optimizer: str = "factored"
    """adamw; factored (as adamw, without momentum and with factored second moments: no copies of the weights); sgd"""
    mask_lr: float = 0.03
    """step of the mask's logits"""
    temperature: float = 0.2
    """T of the soft mask sigmoid(x / T)"""
    illegal_weight: float = 1.0
    """weight of the loss in the forbidden domain, which should rise"""
    innocent_weight: float = 1.0
    """weight of the loss in the allowed domain, which should fall"""
    paper: bool = False
    """freeze: the update as published, sparsity penalty instead of an exact budget"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    seed: int = 0
    checkpoint_every: int = 10
    """mask updates between checkpoints; the run resumes from the last one"""
    uce: UceOptions = field(default_factory=UceOptions)
    imma: ImmaOptions = field(default_factory=ImmaOptions)

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise InputError(f"--budget {self.budget:g}: give a share above 0 and below 1")
        _choice("by", self.by, UNITS)
        _choice("user-optimizer", self.user_optimizer, OPTIMIZERS)
        for name in ("tune_steps", "updates", "interval", "checkpoint_every"):
            _at_least_one(name, getattr(self, name))
        if self.batch < 2:
            raise InputError(f"--batch {self.batch}: must be at least 2, half of either domain")
        for name in ("user_lr", "mask_lr", "temperature"):
            _above(name, getattr(self, name))
        for name in ("illegal_weight", "innocent_weight", "cost_weight"):
            if not 0 <= getattr(self, name) < 1e6:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or above"
                )
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: must not be negative")


def _choice(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"--{option} {given}: choose {', '.join(known)}")


def _at_least_one(option: str, given: int) -> None:
    if given < 1:
        raise InputError(f"--{option.replace('_', '-')} {given}: must be at least 1")


def _above(option: str, given: float) -> None:
    if not 0 < given < 1e9:
        raise InputError(f"--{option.replace('_', '-')} {given}: must be above 0")
