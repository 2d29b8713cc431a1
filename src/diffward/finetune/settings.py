"""What a training run is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from diffward.errors import InputError
from diffward.models.adapters import TARGETS


@dataclass
class Privacy:
    """How hard a private method presses: mp, smp, hinge, dual, moment, distill."""

    weight: float | None = None
    """lambda, the weight of the privacy term; without it the method's own"""
    paper: bool = False
    """mp, smp: exactly as the paper's equations and network have it"""
    attacker_lr: float | None = None
    """learning rate of the proxy attacker; without it the method's own"""
    share: float = 0.5
    """share of a batch's pictures that carry the privacy term"""
    every: int = 1
    """steps between updates of the proxy attacker"""
    target_auc: float = 0.55
    """dual: the attacker's AUC to stay below"""
    folds: int = 2
    """distill: parts of the pictures, each answered by a teacher that never saw it"""
    # Not in the repr: the file of finished teachers hashes it, and `targets` and `lr` of a teacher tell these two.
    teacher_targets: str = field(default="", repr=False)
    """distill: what the teachers adapt, as --targets; without it the same"""
    teacher_lr: float | None = field(default=None, repr=False)
    """distill: the teachers' learning rate; without it the same"""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight < 1e6:
            raise InputError(f"--privacy.weight {self.weight}: must be 0 or above")
        if self.attacker_lr is not None and not self.attacker_lr > 0:
            raise InputError(f"--privacy.attacker-lr {self.attacker_lr}: must be above 0")
        if not 0 < self.share <= 1:
            raise InputError(f"--privacy.share {self.share}: must be above 0, at most 1")
        if self.every < 1:
            raise InputError(f"--privacy.every {self.every}: must be at least 1")
        if self.folds < 2:
            raise InputError(f"--privacy.folds {self.folds}: must be at least 2")
        if self.teacher_lr is not None and not 0 < self.teacher_lr < 1e9:
            raise InputError(f"--privacy.teacher-lr {self.teacher_lr}: must be above 0")
        if not 0.5 <= self.target_auc < 1:
            raise InputError(f"--privacy.target-auc {self.target_auc}: must be in [0.5, 1)")


@dataclass
class DP:
    """Differential privacy, for the method dp: give `epsilon` or `noise`."""

    epsilon: float = 0.0
    """epsilon to reach at the end of the run; the noise follows from it"""
    delta: float = 0.0
    """chance that the bound fails; 0: a tenth of one over the number of pictures, down to a power of ten"""
    noise: float = 0.0
    """noise multiplier, in place of epsilon"""
    clip: float = 1.0
    """largest gradient norm of one picture"""
    accountant: str = "prv"
    """prv or rdp"""

    def __post_init__(self) -> None:
        for name in ("epsilon", "noise"):
            if not 0 <= getattr(self, name) < 1e6:
                raise InputError(f"--dp.{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.delta < 1:
            raise InputError(f"--dp.delta {self.delta}: must be in (0, 1), well below 1 / pictures")
        if not self.clip > 0:
            raise InputError(f"--dp.clip {self.clip}: must be above 0")
        if self.accountant not in ("prv", "rdp"):
            raise InputError(f"--dp.accountant {self.accountant}: choose prv or rdp")


@dataclass
class GaugeOptions:
    """The privacy gauge: a look at members and validation pictures every so many steps."""

    every: int = 0
    """steps between readings; 0: 20 readings in the run where the method needs them, else none"""
    pictures: int = 64
    """pictures a side, at most"""
    pairs: int = 8
    """noise draws a picture"""
    stop_auc: float = 0.0
    """stop when the members' AUC passes this, and keep the last weights below; 0: never"""
    patience: int = 5
    """earlystop: readings without a better validation loss before it stops"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("every", 0),
            ("pictures", 2),
            ("pairs", 2),
            ("patience", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"--gauge.{name} {getattr(self, name)}: must be at least {least}")
        if self.stop_auc and not 0.5 < self.stop_auc <= 1:
            raise InputError(f"--gauge.stop-auc {self.stop_auc}: must be above 0.5, at most 1")


@dataclass
class Settings:
    """Settings of one training run; names are those of the command line."""

    steps: int = 0
    """optimizer steps; 0 means: as many as `epochs` passes take"""
    epochs: float = 50.0
    """passes over the pictures, where `steps` is 0"""
    batch: int = 8
    """pictures in one forward pass"""
    accumulate: int = 1
    """forward passes in one optimizer step"""
    lr: float = 1e-3
    """learning rate"""
    weight_decay: float = 1e-2
    optimizer: str = "adamw"
    """adamw or lion"""
    init: str = "uniform"
    """how A starts: uniform (PEFT and kohya) or gaussian (diffusers' scripts); B is zero"""
    clip: float = 1.0
    """largest gradient norm; 0 for none"""
    schedule: str = "constant"
    """constant or cosine"""
    warmup: int = 0
    """steps over which the learning rate rises from 0"""
    tune: str = "lora"
    """lora, or full (all weights of the UNet)"""
    rank: int = 8
    alpha: float = 8.0
    targets: str = "attention"
    """text (keys and values of the cross-attention), attention, attention+ff, all, or suffixes of module
    names with commas between"""
    text_encoder: bool = False
    """adapt the text encoder too"""
    flip: bool = False
    """show mirrored pictures too"""
    drop_caption: float = 0.0
    """share of samples shown without their caption"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    seed: int = 0
    checkpoint_every: int = 500
    """steps between checkpoints; the run resumes from the last one"""
    sample_every: int = 0
    """steps between rows of the sample grid; 0 for the first and last row only"""
    sample_prompts: list[str] = field(default_factory=list)
    """prompts of the sample grid; without any, the first captions if `sample_every` is set"""
    track: str = "none"
    """none or tensorboard"""
    prior_weight: float = 1.0
    """weight of the class pictures' loss, where there are any (DreamBooth)"""
    privacy: Privacy = field(default_factory=Privacy)
    dp: DP = field(default_factory=DP)
    gauge: GaugeOptions = field(default_factory=GaugeOptions)

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "rank", "checkpoint_every"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)}: must be at least 1")
        if self.steps < 0 or not self.epochs > 0:
            raise InputError("--steps must not be negative and --epochs must be above 0")
        if not self.lr > 0:
            raise InputError(f"--lr {self.lr}: must be above 0")
        if (
            self.steps > 10**9
            or self.epochs > 10**7
            or self.clip < 0
            or self.warmup < 0
            or self.seed < 0
        ):
            raise InputError(
                "--steps, --epochs, --clip, --warmup and --seed must be numbers that make sense, not negative"
            )
        for name, known in (
            ("schedule", ("constant", "cosine")),
            ("tune", ("lora", "full")),
            ("track", ("none", "tensorboard")),
            ("optimizer", ("adamw", "lion")),
            ("init", ("uniform", "gaussian")),
        ):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"--{name} {value}: choose {' or '.join(known)}")
        if not 0 <= self.prior_weight < 1e6:
            raise InputError(f"--prior-weight {self.prior_weight}: must be 0 or above")
        if not 0 <= self.drop_caption < 1:
            raise InputError(f"--drop-caption {self.drop_caption}: must be in [0, 1)")

    def target_modules(self) -> list[str]:
        return list(
            TARGETS.get(self.targets) or [t.strip() for t in self.targets.split(",") if t.strip()]
        )

    def total_steps(self, pictures: int) -> int:
        """Optimizer steps of the whole run over `pictures` pictures (repeats counted)."""
        per_step = self.batch * self.accumulate
        return self.steps or max(1, round(self.epochs * pictures / per_step))

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `steps`."""
        import math

        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


# Options of `privacy` that came after runs were kept.
_LATER = {"teacher_targets": "", "teacher_lr": None}


def identity_of(settings: Settings) -> dict[str, Any]:
    """The settings as a dictionary, as what is kept of a run has them.

    Options that came later are left out while they stand at their default, so that a run from before is still itself.
    """
    told = asdict(settings)
    for name, default in _LATER.items():
        if told["privacy"][name] == default:
            del told["privacy"][name]
    return told
