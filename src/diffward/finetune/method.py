"""What a training method is, and the registry of them.

The loop draws the batch and the noise, calls `loss`, and does the rest. A method turns a batch into
one loss a sample; it never averages and never steps the trained weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffward.registry import Registry

if TYPE_CHECKING:
    from diffward.finetune.gauge import Reading
    from diffward.finetune.settings import Settings
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

Verdict = Literal["go", "keep", "stop"]


@dataclass
class Batch:
    """Latents (B, C, h, w), conditioning (B, L, D), t (B,), eps (B, C, h, w), rows (B,) of the data."""

    latents: Tensor
    conditioning: Tensor
    t: Tensor
    eps: Tensor
    rows: Tensor


@dataclass
class Auxiliary:
    """Pictures that the training itself compares; an audit must not judge them.

    Attributes:
        members: rows (long) of the training features that a proxy attacker may learn from.
        non_members: pictures that do not train, for the proxy attacker.
        gauge_members: rows of the training features for the gauge, none of `members`.
        validation: pictures that do not train, for the gauge and the validation loss, none of `non_members`.
    """

    members: Tensor
    non_members: Features
    gauge_members: Tensor
    validation: Features


@dataclass
class Run:
    """What a method may know of the run that it is part of; `total` counts optimizer steps."""

    denoiser: Denoiser
    features: Features
    settings: Settings
    parameters: list[nn.Parameter]
    order: list[int]
    total: int
    auxiliary: Auxiliary | None = None
    _kept: nn.Module | None = None

    def keep_reference(self) -> None:
        """Called in `start` by a method that needs `reference`: full fine-tuning overwrites the base."""
        if self.settings.tune == "full":
            self._kept = copy.deepcopy(self.denoiser.unet).requires_grad_(False)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within the block the denoiser's UNet is the base's."""
        if self.settings.tune == "lora":
            with self.denoiser.adapter(False):
                yield
            return
        assert self._kept is not None, "keep_reference was not called"
        trained, self.denoiser.unet = self.denoiser.unet, self._kept
        try:
            yield
        finally:
            self.denoiser.unet = trained


class Method:
    """One way of fine-tuning. Only `loss` is required.

    Attributes:
        needs_auxiliary: whether it compares members with pictures that do not train.
        needs_gauge: whether it wants readings of the gauge.
        own_clipping: whether it bounds the gradient itself, so that the loop must not.
        options: of the settings that are not every method's (`privacy`, `dp`, `gauge.patience`), those it reads;
            a run that is given another one is refused.
    """

    needs_auxiliary: ClassVar[bool] = False
    needs_gauge: ClassVar[bool] = False
    own_clipping: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset()

    def reads(self, settings: Settings) -> frozenset[str]:
        """Of `options`, those that a run with these settings reads."""
        return self.options

    def precede(
        self, denoiser: Denoiser, features: Features, settings: Settings, order: list[int], folder: Path | None,
        groups: Sequence[int] | None,
    ) -> None:  # fmt: skip
        """Called first of all, while the base is bare.

        Args:
            order: rows of one epoch.
            folder: where the run keeps its own files; None keeps nothing.
            groups: near-duplicates among the pictures share a number; None where every picture is its own.

        Raises:
            InputError: the method cannot work with these settings or pictures.
        """

    def start(self, run: Run) -> None:
        """Called once, with the adapter in place, before the optimizer is made.

        Raises:
            InputError: the method cannot work with these settings or pictures.
        """

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer that steps; a method may wrap the loop's."""
        return optimizer

    def passes(self, step: int) -> int | None:
        """Forward passes of this step; None: as many as the settings say."""
        return None

    def rows(self, step: int, micro: int) -> Tensor | None:
        """Rows (n,) of the pictures of this forward pass, perhaps none; None: in the loop's order."""
        return None

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """The loss (B,) of each sample, with gradient."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after optimizer step number `step`, from 0."""

    def read(self, reading: Reading) -> Verdict:
        """What a reading of the gauge means: go on, keep these weights as the best, or stop."""
        return "go"

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors, numbers, strings, and containers of them."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take up `state` again."""

    def told(self) -> str:
        """A few words for the progress line."""
        return ""

    def facts(self) -> dict[str, str]:
        """What the model file's header may say of the method; nothing about the data."""
        return {}

    def finish(self) -> None:
        """Take off what `start` put on the denoiser."""


METHODS: Registry[type[Method]] = Registry("method")


def name_of(method: Method) -> str:
    """What a method is registered as."""
    return next((m.name for m in METHODS if m.obj is type(method)), type(method).__name__.lower())
