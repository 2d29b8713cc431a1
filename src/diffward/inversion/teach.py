"""Teaching what is learned from z: what to draw, and a set of vectors. The encoder and the base stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from diffward.inversion.data import OTHER_PICTURES
from diffward.inversion.identity import PICTURES
from diffward.inversion.sets import chamfer
from diffward.stage import cosine, run_stage, set_rate

if TYPE_CHECKING:
    from diffward.inversion.data import Data
    from diffward.inversion.inverter import Inverter
    from diffward.inversion.subjects import Subjects
    from diffward.models.denoiser import Denoiser


@dataclass
class Pupil:
    """An inverter whose decoders are taught, from z (n, latent) of its training rows and pictures of their subjects."""

    inverter: Inverter
    data: Data
    z: Tensor
    subjects: Subjects
    denoiser: Denoiser
    work: Path
    run: str
    seed: int

    @cached_property
    def rows(self) -> list[int]:
        """Rows that have a subject."""
        return (self.data.subject > 0).nonzero()[:, 0].tolist()

    @cached_property
    def latents(self) -> dict[int, Tensor]:
        """Of each subject, latents (m, C, h, w) of pictures that no LoRA was trained on."""
        found: dict[int, Tensor] = {}
        for identity in sorted({self.data.rows[i].identity for i in self.rows}):
            pictures = self.subjects.pictures(identity, PICTURES, OTHER_PICTURES)
            found[identity] = self.denoiser.encode(np.stack([p.pixels for p in pictures])).cpu()
        return found

    def draw(self, number: int, size: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """z (size, latent) of random rows, and the latents of one picture of the subject of each."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        rows = [self.rows[i] for i in torch.randint(len(self.rows), (size,), generator=g).tolist()]
        latents = []
        for row in rows:
            own = self.latents[self.data.rows[row].identity]
            latents.append(own[int(torch.randint(len(own), (1,), generator=g))])
        device = self.denoiser.device
        return self.z[rows].to(device), torch.stack(latents).to(device), g


def train_latents(pupil: Pupil, steps: int, batch: int = 128) -> None:
    """z to latents: the mean picture of a subject is what squared error leaves."""
    decoder = pupil.inverter.pictures.to(pupil.denoiser.device)

    def loss(number: int) -> Tensor:
        z, latents, _ = pupil.draw(number, batch)
        return (decoder(z) - latents).square().mean()

    _teach(pupil.work, pupil.run, "latent decoder", decoder, loss, steps)


def train_prompt(pupil: Pupil, steps: int, batch: int = 16) -> None:
    """z to a caption's states: the base's own loss on the subject's pictures, LoRA off (an amortised textual inversion)."""
    denoiser, decoder = pupil.denoiser, pupil.inverter.prompt.to(pupil.denoiser.device)
    null = denoiser.condition([""])

    def loss(number: int) -> Tensor:
        z, latents, g = pupil.draw(number, batch)
        t = torch.randint(denoiser.schedule.config.num_train_timesteps, (batch,), generator=g).to(
            denoiser.device
        )
        eps = torch.randn(latents.shape, generator=g).to(denoiser.device)
        return denoiser.errors(latents, t, eps, decoder(z, null)).mean()

    _teach(pupil.work, pupil.run, "prompt decoder", decoder, loss, steps)


def train_set(
    inverter: Inverter,
    sets: Tensor,
    z: Tensor,
    steps: int,
    work: Path,
    run: str,
    seed: int = 0,
    batch: int = 256,
) -> None:
    """z (n, latent) to a set of vectors near those of single training pictures.

    Args:
        sets: (n, P, k), standardised; NaN where a LoRA has fewer pictures, or none.
    """
    head = inverter.picture_set
    assert head is not None
    rows = sets.isfinite().all(-1).any(1).nonzero()[:, 0]
    with torch.no_grad():
        identity = inverter.heads(z)["identity"]

    def loss(number: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + number)
        some = rows[torch.randint(len(rows), (batch,), generator=g)]
        return chamfer(head(z[some], identity[some]), sets[some]).mean()

    _teach(work, run, "picture set", head, loss, steps)


def _teach(
    work: Path, run: str, name: str, decoder: nn.Module, loss: Callable[[int], Tensor], steps: int
) -> None:
    """Each step's randomness must come from its number."""
    lr = 1e-3
    optimizer = torch.optim.AdamW(decoder.parameters(), lr, weight_decay=1e-2, foreach=True)

    def step(number: int) -> dict[str, float]:
        set_rate(optimizer, lr * cosine(number, steps, warmup=min(100, steps // 10 + 1)))
        value = loss(number)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return {"loss": float(value.detach())}

    state = {"decoder": decoder, "optimizer": optimizer}
    run_stage(name, steps, step, state, work / f"{name.replace(' ', '-')}.pt", run=run)
    decoder.cpu()
