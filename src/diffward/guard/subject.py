"""What a guard works on, what it gives, and the registry of guards."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffward.errors import InputError, TrainingError
from diffward.guard.processes import world
from diffward.guard.settings import GuardSettings
from diffward.guard.stored import Stored
from diffward.models.parameters import parameters_of, put
from diffward.registry import Registry

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


@dataclass
class Found:
    """What a guard gives: a score a tensor (N,), from which a mask follows, or edited weights by name.

    Attributes:
        facts: what the artefact may say of it; nothing about the pictures.
    """

    scores: Tensor | None = None
    edited: dict[str, Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """A base and the two domains.

    Attributes:
        illegal, innocent: encoded pictures and captions.
        concepts: words for what `uce` erases; the guide stands in their place.
        work: where intermediate results are kept, so that a run resumes; None keeps nothing.
    """

    denoiser: Denoiser
    illegal: Features
    innocent: Features
    settings: GuardSettings
    work: Path | None = None
    concepts: list[str] = field(default_factory=list)
    guide: str = ""

    @cached_property
    def _folder(self) -> Path:
        """Where copies of the weights lie."""
        if self.work is not None:
            self.work.mkdir(parents=True, exist_ok=True)
            return self.work
        self._temporary = tempfile.TemporaryDirectory()
        return Path(self._temporary.name)

    @property
    def names(self) -> list[str]:
        """Every parameter of the UNet, in its order."""
        return list(parameters_of(self.denoiser.unet))

    @cached_property
    def base(self) -> Stored:
        """theta_pre, in a file; first asked for before anything is trained."""
        return Stored.write(
            self._folder / "base.safetensors",
            parameters_of(self.denoiser.unet),
            self.denoiser.device,
        )

    @cached_property
    def tuned(self) -> Stored:
        """theta_ft: the base after full fine-tuning on both domains, in a file. The base is left as it was.

        Half of the pictures of a batch come from either domain, however many pictures each has.

        Raises:
            TrainingError: a loss was not finite.
        """
        from diffward.finetune import Settings, train
        from diffward.guard.both import Both

        given, path = self.settings, self._folder / "tuned.safetensors"
        self.base  # noqa: B018 (written before anything trains)
        run = self._tuning()
        if path.exists() and Stored(path).run != run:
            raise InputError(
                f"{path}: is of a fine-tuning on other pictures, settings, base or number of processes, or of an earlier "
                "version; choose another folder, or delete it"
            )
        if not path.exists():
            settings = Settings(
                steps=given.tune_steps, batch=given.batch, lr=given.user_lr, tune="full", seed=given.seed,
                schedule="cosine",
                gradient_checkpointing=given.gradient_checkpointing,
            )  # fmt: skip
            both, method = Both.of(self.illegal, self.innocent)
            checkpoint = self.work / "tuning.pt" if self.work else None
            try:
                train(
                    self.denoiser, both, method, settings, checkpoint=checkpoint, rate_option="--user-lr"
                )  # fmt: skip
                Stored.write(path, parameters_of(self.denoiser.unet), run=run)
            except TrainingError as error:
                raise TrainingError(f"full fine-tuning on both domains, {error}") from error
            finally:
                self.restore()
            if checkpoint:
                checkpoint.unlink(missing_ok=True)
        return Stored(path, self.denoiser.device)

    def _tuning(self) -> str:
        """What theta_ft is a function of, as a hash."""
        told = [getattr(self.settings, name) for name in ("tune_steps", "batch", "user_lr", "seed")]
        told += [self.illegal.digest(), self.innocent.digest(), self.denoiser.unet_identity]
        told += [str(self.denoiser.compute_dtype), world()[0]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def restore(self) -> None:
        """Put the base's weights back."""
        put(self.denoiser.unet, self.base)
        self.denoiser.unet.requires_grad_(False)

    @cached_property
    def costs(self) -> Tensor:
        """(N,): what the budget counts."""
        from diffward.guard.cost import training_costs

        unet, by = self.denoiser.unet, self.settings.by
        sizes = torch.tensor([p.numel() for p in parameters_of(unet).values()], dtype=torch.float64)
        if by == "tensors":
            return torch.ones_like(sizes)
        return sizes if by == "parameters" else training_costs(self.denoiser)


Guard = Callable[[Subject], Found]
GUARDS: Registry[Guard] = Registry("guard")
"""`extra` of an entry says which `domains` must have pictures, and which `options` it reads (see `guard.options`);
`not_published` are those of them that the update as published does not know."""
BOTH = ("illegal", "innocent")
MASKS = frozenset({"budget", "by", "cost_weight"})  # what every guard that scores tensors reads
TUNING = frozenset({"tune_steps", "batch", "user_lr", "gradient_checkpointing"})  # for theta_ft


def check_domains(
    method: str, illegal: Features, innocent: Features, hashes: tuple[set[str], set[str]]
) -> None:
    """Raises `InputError` where a domain that the guard needs is empty, or a picture is in both."""
    for name, features in (("illegal", illegal), ("innocent", innocent)):
        if name in GUARDS[method].extra["domains"] and not len(features):
            raise InputError(f"--{name}: no picture in it")
    if both := hashes[0] & hashes[1]:
        raise InputError(
            f"--illegal and --innocent share {len(both)} pictures; take them out of one of the two"
        )
