"""The paper's opponent, as its equations and its public code have it: for tables, not for use.

Luo et al. (2025), arXiv 2402.11989, Algorithms 1 and 2. Where they differ the code is followed: the
attacker sees the error map and not its mean, and moves after the model; cross-entropy on the member side
without the equation's factor 1/2. Its batch is as large as the model's on either side (theirs: 1 and 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffward.finetune.method import Batch, Run
from diffward.finetune.private import auxiliary_of, everyones, own_sampler, place
from diffward.finetune.proxy import PaperAttacker, drawing
from diffward.finetune.sampler import generator

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

RATE, DECAY = 1e-5, 1e-4  # of Adam
STREAM = 20


class PaperOpponent:
    """A `PaperAttacker` of this run's size of latents; a second forward pass for the privacy term."""

    def __init__(self, run: Run) -> None:
        settings, auxiliary = run.settings, auxiliary_of(run)
        self.run, self.every = run, settings.privacy.every
        size = run.features.latents[0].numel()
        self.attacker = PaperAttacker(size, settings.seed).to(run.denoiser.device)
        self.attacker.requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.attacker.parameters(), lr=settings.privacy.attacker_lr or RATE, weight_decay=DECAY
        )
        others = auxiliary.non_members
        self.draw = (
            own_sampler(run, others, range(len(others)), settings.batch, STREAM),
            own_sampler(run, run.features, auxiliary.members.tolist(), settings.batch, STREAM + 1),
        )
        self.right = 0.5

    def cross_entropy(
        self, denoiser: Denoiser, batch: Batch, errors: Tensor, step: int, micro: int
    ) -> Tensor:
        """CE (B,) of the whole batch under t and noise of its own, dropout on, with gradient."""
        seed = self.run.settings.seed
        stream = STREAM + (micro << 8) + (place()[0] << 20)
        random = generator(seed, step, stream)
        t = torch.randint(self.draw[0].timesteps, (len(batch.t),), generator=random)
        eps = torch.randn(batch.eps.shape, generator=random)
        again = denoiser.errors(batch.latents, t.to(batch.t), eps.to(batch.eps), batch.conditioning)
        with drawing(seed, step, stream):
            logits = self.attacker(again)
        return cross_entropy(logits, torch.ones_like(batch.t), reduction="none")

    def after_step(self, step: int) -> None:
        """One update on as many auxiliary members as others, one pass of the model without gradient."""
        if step % self.every:
            return
        batches = [draw(step // self.every, 0) for draw in self.draw]
        with torch.no_grad():
            errors = self.run.denoiser.errors(
                torch.cat([b.latents for b in batches]), torch.cat([b.t for b in batches]),
                torch.cat([b.eps for b in batches]), torch.cat([b.conditioning for b in batches]),
            )  # fmt: skip
        errors = torch.cat([e.to(errors) for e in everyones([errors.cpu()])])
        sides = torch.arange(2, device=errors.device).repeat_interleave(len(batches[0].t))
        sides = sides.repeat(len(errors) // len(sides))
        self.attacker.requires_grad_(True)
        with torch.enable_grad(), drawing(self.run.settings.seed, step, STREAM - 1):
            logits = self.attacker(errors)
            self.optimizer.zero_grad(set_to_none=True)
            cross_entropy(logits, sides).backward()
            self.optimizer.step()
        self.attacker.requires_grad_(False)
        right = (logits.argmax(1) == sides).float().mean().item()
        self.right += (1 - 0.98 ** len(sides)) * (right - self.right)

    def told(self) -> str:
        return f"attacker {self.right:.2f}"

    def state(self) -> dict[str, Any]:
        return {
            "attacker": self.attacker.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "right": self.right,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.attacker.load_state_dict(state["attacker"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.right = float(state["right"])
