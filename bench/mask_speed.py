"""An update of the mask (its step and 4 of the user): ours, and the published loop that encodes in every step.

Same UNet with the block layout of SD 1.5 at a tenth of its widths (686 tensors, 8.6M parameters), same
pictures, batch 16, fp32, one thread, in turns in one process. The encoders are as large as gives them about the
share of a published step that was measured of the public code on such a UNet: autoencoder 7 to 8 %
(27 % at full size), text encoder 1 to 2 %.

Copies of the weights at the peak are counted: `Ledger` follows every storage that an operation makes during an
update, in forward, backward and hooks alike. A storage counts as weights if it was there before and
belongs to them (theta; theta_ft or d; the optimizer's state), if it has the shape of a parameter (gradients), or if it
was made where weights are updated, whatever its shape. That is done on 5 pictures of either domain, as no side
of an activation's shape then is that of a weight; what belongs to weights does not depend on the batch. Scratch inside a
single operation is not seen. theta_pre of ours lies in a file that the system maps: it is left out here, and
looked at apart by how much of the mapping the process made its own.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from bench._ledger import Ledger, mappings
from bench._published_mask import PublishedMask
from bench._result import record
from bench._small_sd15 import PARAMETERS, RESOLUTION, TENSORS, small_denoiser
from bench._support import draw_folder, interleaved

if TYPE_CHECKING:
    from torch import Tensor

    from diffward.data import Pictures
    from diffward.guard.subject import Subject
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

SEED = 0
BATCH, COUNTED = 16, 10  # pictures in a step: where it is timed, where memory is counted
PICTURES = 32  # of each domain
# The user's optimizer, and passes of 16 pictures in an update.
WAYS = (("factored", 4), ("adamw", 4), ("factored", 2), ("adamw", 2))


def run(quick: bool = False) -> None:
    if quick:
        rows = compare(8, WAYS[2:], 2)
    else:
        rows = [row for factor in (8, 4) for row in compare(factor, WAYS, 9)]
    record("mask-speed", rows, seeds=[SEED], quick=quick, notes=[
        "an update of the mask: published: 1 mask step and 4 steps of the user on batches of 16, VAE and text encoder in "
        "each, gradient checkpointing, plain SGD; ours: passes of 16 pictures, half of either domain, the user moving "
        "after either half and both halves read for the mask, latents and embeddings encoded once. At 4 passes as many "
        "pictures train the user as in the published loop, in 8 moves; at 2 passes it makes as many moves, of 8 pictures",
        "latent: side of the latents of 64-pixel pictures, 8 with an autoencoder that shrinks by 8 as SD's does",
        "seconds: processor time of the one thread, so that what else the machine does counts little; medians of rounds in "
        "turns; hooks_s: what of ours_s goes into reading and moving weights; time_ratio: median over the rounds of "
        "published / ours, time_ratio_range: smallest and largest",
        "copies_at_peak: storages that are weights or made of them, in units of the UNet's fp32 bytes, counted as the "
        "module's text says; published_copies: the same of the published loop; base_private: what of theta_pre, which "
        "lies in a mapped file, became private memory, in the same units",
    ])  # fmt: skip


def compare(factor: int, ways: Sequence[tuple[str, int]], rounds: int) -> list[dict[str, Any]]:
    """One row a user's optimizer and number of passes, latents of 64 / `factor`."""
    with tempfile.TemporaryDirectory() as name, one_thread():
        pictures = drawn(Path(name))
        theirs, *ours = _ways(factor, ways, pictures, BATCH)
        there, *here = interleaved(rounds, theirs.seconds, *(way.seconds for way in ours))
        counted = [way.copies() for way in _ways(factor, ways, pictures, COUNTED)]
        rows = []
        for way, seconds, copies in zip(ours, here, counted[1:], strict=True):
            assert isinstance(way, Ours)
            ratios = [b / a for a, b in zip(seconds, there, strict=True)]
            rows.append({
                "user_optimizer": way.optimizer, "passes": way.interval, "users_moves": 2 * way.interval,
                "latent": RESOLUTION // factor, "tensors": TENSORS,
                "parameters": PARAMETERS, "batch": BATCH, "updates": rounds, "ours_s": median(seconds),
                "hooks_s": way.hooks / way.done, "published_s": median(there), "time_ratio": median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)], "copies_at_peak": copies,
                "published_copies": counted[0], "base_private": way.base_private(),
            })  # fmt: skip
    return rows


def _ways(
    factor: int, wanted: Sequence[tuple[str, int]], pictures: Pictures, batch: int
) -> list[Way]:
    """The published loop, then ours with each optimizer; each has made one update, so that all is warm."""
    ours = [Ours(factor, pictures, *way, batch) for way in wanted]
    ways = [Published(factor, pictures, ours[0].subject.tuned, batch), *ours]
    for way in ways:
        way.update()
    return ways


class Way:
    """One of the two loops."""

    ledger: Ledger | None = None

    def update(self) -> None:
        """Make one update of the mask."""
        raise NotImplementedError

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """The UNet's parameters, and all that stays between updates and belongs to weights, they included."""
        raise NotImplementedError

    def ranges(self) -> list[range]:
        """Addresses of weights that lie in a file."""
        return []

    def seconds(self) -> float:
        """Processor seconds of an update."""
        began = time.process_time()
        self.update()
        return time.process_time() - began

    def copies(self) -> float:
        """Of the weights, at the peak of an update."""
        self.ledger = Ledger(*self.weights(), self.ranges())
        with self.ledger:
            self.update()
        found, self.ledger = self.ledger.copies, None
        return found

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Around what is done to weights."""
        return self.ledger.updating() if self.ledger else contextlib.nullcontext()


class Ours(Way):
    """`guard learn`'s loop.

    Attributes:
        hooks: processor seconds that its hooks took, of `done` updates.
    """

    def __init__(
        self, factor: int, pictures: Pictures, optimizer: str, interval: int, batch: int
    ) -> None:
        from diffward.guard.bilevel import Simulation
        from diffward.guard.effective import Effective
        from diffward.guard.settings import GuardSettings
        from diffward.guard.subject import Subject
        from diffward.guard.user import make_optimizer

        self.optimizer, self.interval, self.done, self.hooks = optimizer, interval, 0, 0.0
        denoiser = small_denoiser(factor)
        settings = GuardSettings(
            tune_steps=1, interval=interval, batch=batch, user_optimizer=optimizer, seed=SEED
        )
        self.subject = Subject(denoiser, *domains(denoiser, pictures), settings)
        base, tuned = self.subject.base, self.subject.tuned
        self.upper = upper_of(self.subject)
        self.effective = Effective(
            denoiser.unet, base, tuned, self.upper.mask(), make_optimizer(optimizer), settings.user_lr
        )  # fmt: skip
        self.simulation = Simulation(self.subject, self.effective)
        self._watch_hooks()
        self.effective.__enter__()

    def update(self) -> None:
        from diffward.guard.bilevel import one_update

        one_update(self.simulation, self.upper, self.done)
        self.effective.set_mask(self.upper.mask())
        self.done += 1

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        own = list(self.effective.parameters.values())
        state = [t for t in tree_leaves(self.effective.user.state()) if isinstance(t, torch.Tensor)]
        return own, [*own, *self.effective.tuned.values(), *state]

    def ranges(self) -> list[range]:
        return [part for part, _ in mappings(self.subject.base.path)]

    def base_private(self) -> float | None:
        """What of theta_pre's mapping is this process's own, in copies of the weights; None where not told."""
        found = mappings(self.subject.base.path)
        size = sum(p.nbytes for p in self.effective.parameters.values())
        return sum(own for _, own in found) / size if found else None

    def _watch_hooks(self) -> None:
        make, together = self.effective._arrives, self.effective._all_vectors

        def watched(work: Callable[..., None]) -> Callable[..., None]:
            def timed(*given: Any) -> None:
                began = time.process_time()
                with self.updating():
                    work(*given)
                self.hooks += time.process_time() - began

            return timed

        self.effective._arrives = lambda name: watched(make(name))  # type: ignore[method-assign]
        self.effective._all_vectors = watched(together)  # type: ignore[method-assign]


class Published(Way):
    """The published loop."""

    def __init__(
        self, factor: int, pictures: Pictures, tuned: Mapping[str, Tensor], batch: int
    ) -> None:
        self.loop = PublishedMask(
            small_denoiser(factor), pictures.pixels(RESOLUTION), pictures.captions,
            torch.arange(len(pictures)) < len(pictures) // 2, tuned, batch=batch, seed=SEED, updating=self.updating,
        )  # fmt: skip

    def update(self) -> None:
        self.loop()

    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        own = list(self.loop.unet.parameters())
        return own, [*own, *self.loop.d]


def upper_of(subject: Subject) -> Any:
    """The upper level of `guard learn`; what fine-tuning gains says nothing on random weights and is left out."""
    from diffward.guard.freeze import Budgeted

    return Budgeted(subject.settings, subject.costs, (1.0, 1.0))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(folder: Path) -> Pictures:
    """Pictures of both domains, the forbidden first."""
    from diffward.data import load_pictures

    return load_pictures(draw_folder(folder / "drawn", 2 * PICTURES, [SEED, 31], size=RESOLUTION))


def domains(denoiser: Denoiser, pictures: Pictures) -> tuple[Features, Features]:
    from diffward.models.features import encode_pictures

    features = encode_pictures(denoiser, pictures, cache=False)
    half = len(pictures) // 2
    return features.of(range(half)), features.of(range(half, len(pictures)))
