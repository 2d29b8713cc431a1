"""What the methods with a proxy attacker share: what is compared, and the base class.

The attacker is h, e_i the error map of picture i under the adapted model; CE_i = -log h(member | e_i) is
small where the attacker knows the picture for a member. Each method turns L_i and CE_i into a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from diffward.finetune.method import Auxiliary, Batch, Method, Run
from diffward.finetune.sampler import Sampler, seed_of

if TYPE_CHECKING:
    from diffward.finetune.settings import Settings
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features


class Opponent(Protocol):
    """A proxy attacker and its training beside that of the weights it attacks."""

    def cross_entropy(
        self, denoiser: Denoiser, batch: Batch, errors: Tensor, step: int, micro: int
    ) -> Tensor: ...
    def after_step(self, step: int) -> None: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def told(self) -> str: ...


class Private(Method):
    """Base of the methods that resist a proxy attacker.

    Attributes:
        default_weight: lambda where `--privacy.weight` is not given.
        paper_weight: the paper's; None where the method is not the paper's.
    """

    needs_auxiliary = True
    options = frozenset({"privacy.weight", "privacy.attacker_lr", "privacy.share", "privacy.every"})
    default_weight: ClassVar[float]
    paper_weight: ClassVar[float | None] = None

    def reads(self, settings: Settings) -> frozenset[str]:
        # The paper's term is on the whole batch.
        whole = settings.privacy.paper and "privacy.paper" in self.options
        return self.options - {"privacy.share"} if whole else self.options

    def start(self, run: Run) -> None:
        from diffward.finetune.opponent import OwnOpponent
        from diffward.finetune.paper import PaperOpponent

        options = run.settings.privacy
        self.paper = options.paper
        default = (self.paper and self.paper_weight) or self.default_weight
        self.weight = default if options.weight is None else options.weight
        self.now = (0, 0)
        run.keep_reference()
        self.opponent: Opponent = PaperOpponent(run) if self.paper else OwnOpponent(run)

    def objective(self, loss: Tensor, ce: Tensor) -> Tensor:
        """The loss (n,) of samples whose plain loss and cross-entropy (n,) are given."""
        raise NotImplementedError

    def rows(self, step: int, micro: int) -> None:
        self.now = (step, micro)

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        errors = denoiser.errors(batch.latents, batch.t, batch.eps, batch.conditioning)
        loss = errors.mean(dim=(1, 2, 3))
        # An interrupted step is taken again: nothing that lasts may change before `after_step`.
        ce = self.opponent.cross_entropy(denoiser, batch, errors, *self.now)
        n = len(ce)
        return torch.cat([self.objective(loss[:n], ce), loss[n:]])

    def after_step(self, step: int) -> None:
        self.opponent.after_step(step)

    def state(self) -> dict[str, Any]:
        return {"opponent": self.opponent.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.opponent.load(state["opponent"])

    def told(self) -> str:
        return self.opponent.told()

    def facts(self) -> dict[str, str]:
        name = type(self).__name__.lower() + ("-paper" if self.paper else "")
        return {"ss_privacy_method": name, "ss_privacy_weight": f"{self.weight:g}"}


def auxiliary_of(run: Run) -> Auxiliary:
    assert run.auxiliary is not None  # the loop refuses methods that need it without
    return run.auxiliary


def share_of(run: Run, batch: Batch | int) -> int:
    """How many pictures of a batch carry the privacy term: the first so many."""
    size = batch if isinstance(batch, int) else len(batch.rows)
    return math.ceil(run.settings.privacy.share * size)


def own_sampler(
    run: Run, features: Features, rows: Sequence[int], size: int, stream: int
) -> Sampler:
    """Draws `size` of some pictures at a time, as the loop draws, but with noise of its own."""
    settings = replace(
        run.settings, seed=seed_of(run.settings.seed, 0, (1 << 23) + stream, 0), batch=size, accumulate=1
    )  # fmt: skip
    return Sampler(run.denoiser, features, settings, list(rows), *place())


def place() -> tuple[int, int]:
    """This process's number, and how many train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def everyones(seen: list[Any]) -> list[Any]:
    """What every process saw, alike on all: so they train the same attacker, and one can save it."""
    world = place()[1]
    if world == 1:
        return seen
    found: list[list[Any]] = [[] for _ in range(world)]
    dist.all_gather_object(found, seen)
    return [one for part in found for one in part]


def part(batch: Batch, places: Tensor) -> Batch:
    """The samples of a batch at `places`."""
    at = places.to(batch.t.device)
    return Batch(
        batch.latents[at], batch.conditioning[at], batch.t[at], batch.eps[at],
        batch.rows[places.to(batch.rows.device)],
    )  # fmt: skip


@torch.no_grad()
def base_errors(run: Run, *sides: tuple[Features, Batch]) -> Sequence[Tensor]:
    """Squared errors of the base on batches of pictures, in one pass: few samples cost as much as many."""
    device = run.denoiser.device
    texts = [
        features.conditioning(batch.rows.to(device)) if run.settings.text_encoder else batch.conditioning
        for features, batch in sides
    ]  # fmt: skip
    batches = [batch for _, batch in sides]
    with run.reference():
        errors = run.denoiser.errors(
            torch.cat([b.latents for b in batches]), torch.cat([b.t for b in batches]),
            torch.cat([b.eps for b in batches]), torch.cat(texts),
        )  # fmt: skip
    return errors.split([len(b.rows) for b in batches])
