"""Our own opponent: a proxy attacker that learns from the very forward passes that train the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from diffward.finetune.method import Batch, Run
from diffward.finetune.private import (
    auxiliary_of,
    base_errors,
    everyones,
    own_sampler,
    part,
    share_of,
)
from diffward.finetune.proxy import ProxyAttacker, drawing
from diffward.finetune.sampler import generator

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

RATE, DECAY = 1e-3, 1e-2  # of AdamW
HALF = 16  # samples of each side in an update
# Updates between passes of pictures that do not train: few passes of more pictures cost less.
SPACING = 8
STREAM = 10


class OwnOpponent:
    """A `ProxyAttacker`, trained on auxiliary pictures alone, one update a step.

    Members come with their errors from the step's own forward pass, the others from a pass without
    gradient every `SPACING` updates. Updates draw from the features of the last `window` steps: by age and
    not by number, so that both sides are equally old (else the attacker would learn to tell old from new).
    """

    def __init__(self, run: Run) -> None:
        settings, options = run.settings, run.settings.privacy
        self.run, self.auxiliary, self.every = run, auxiliary_of(run), options.every
        self.attacker = ProxyAttacker(settings.seed).to(run.denoiser.device)
        self.attacker.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.attacker.parameters(), lr=options.attacker_lr or RATE, weight_decay=DECAY
        )
        others = self.auxiliary.non_members
        self.draw = own_sampler(
            run, others, range(len(others)), share_of(run, settings.batch), STREAM
        )
        # Long enough for about 64 samples of the rarer side, as the model that made them does not last.
        size = settings.batch * settings.accumulate
        rates = (
            size * len(self.auxiliary.members) / len(run.order),
            self.draw.settings.batch / (SPACING * self.every),
        )
        self.window = round(min(max(64 / min(rates), 64), 64 * SPACING * self.every))
        self.replay = Replay(self.attacker.width, run.denoiser.device)
        self.right = torch.full((2,), 0.5)  # share judged rightly: others, members
        self._fresh: list[tuple[Tensor, int]] = []

    def cross_entropy(
        self, denoiser: Denoiser, batch: Batch, errors: Tensor, step: int, micro: int
    ) -> Tensor:
        """CE (n,) of the first n samples, with gradient to `errors` (B, C, h, w); one pass of the base."""
        n = share_of(self.run, batch)
        known = torch.isin(batch.rows.cpu(), self.auxiliary.members.cpu())
        # The attacker learns from auxiliary members of the rest of the batch as well.
        places = torch.cat([torch.arange(n), n + known[n:].nonzero().flatten()])
        sides = [(self.run.features, part(batch, places))]
        if micro == 0 and step % (SPACING * self.every) == 0:
            others = self.draw(step // (SPACING * self.every), 0)
            sides.append((self.auxiliary.non_members, others))
        base = base_errors(self.run, *sides)
        at = places.to(errors.device)
        features = self.attacker.features(errors[at], base[0], batch.t[at])
        self._fresh.append((features.detach()[known[places].to(errors.device)].cpu(), 1))
        if len(sides) > 1:
            with torch.no_grad():
                answers = denoiser.errors(others.latents, others.t, others.eps, others.conditioning)
                self._fresh.append((self.attacker.features(answers, base[1], others.t).cpu(), 0))
        return softplus(-self.attacker.judge(features[:n]))

    def after_step(self, step: int) -> None:
        """Take in what the step's passes showed; update the attacker if it is time."""
        fresh, self._fresh = everyones(self._fresh), []
        for features, side in fresh:
            if not len(features):
                continue
            features = features.to(self.run.denoiser.device)
            with torch.no_grad():
                judged = (self.attacker.judge(features) > 0).float().mean().item()
            share = judged if side else 1 - judged
            self.right[side] += (1 - 0.98 ** len(features)) * (share - self.right[side])
            self.replay.add(features, side, step)
            self.attacker.observe(features)
        self.replay.forget(step - self.window)
        if step % self.every == 0:
            self._update(step)

    def _update(self, step: int) -> None:
        """One step of the attacker on as many members as others; none while a side is missing."""
        seed = self.run.settings.seed
        drawn = self.replay.draw(HALF, generator(seed, step, STREAM))
        if drawn is None:
            return
        features, sides = drawn
        self.attacker.train().requires_grad_(True)
        with torch.enable_grad(), drawing(seed, step, 2):
            loss = binary_cross_entropy_with_logits(self.attacker.judge(features), sides)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        self.attacker.eval().requires_grad_(False)

    def told(self) -> str:
        return f"attacker {float(self.right.mean()):.2f}"

    def state(self) -> dict[str, Any]:
        return {
            "attacker": self.attacker.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state(),
            "right": self.right,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.attacker.load_state_dict(state["attacker"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.load(state["replay"])
        self.right = state["right"]


class Replay:
    """Features of the last steps with side (1: member) and step."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.device = device
        self.features = torch.empty(0, width, device=device)
        self.sides, self.steps = torch.empty(0), torch.empty(0, dtype=torch.long)

    def add(self, features: Tensor, side: int, step: int) -> None:
        self.features = torch.cat([self.features, features])
        self.sides = torch.cat([self.sides, torch.full((len(features),), float(side))])
        self.steps = torch.cat([self.steps, torch.full((len(features),), step)])

    def forget(self, step: int) -> None:
        """Drop what is of `step` or before."""
        if len(self.steps) and self.steps[0] <= step:
            young = self.steps > step
            self.features = self.features[young.to(self.device)]
            self.sides, self.steps = self.sides[young], self.steps[young]

    def draw(self, half: int, random: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """At most `half` of each side, equally many: features (2k, F), sides (2k,); None without both."""
        members, others = (
            found[torch.randperm(len(found), generator=random)]
            for found in ((self.sides == side).nonzero().flatten() for side in (1, 0))
        )
        k = min(half, len(members), len(others))
        if not k:
            return None
        chosen = torch.cat([members[:k], others[:k]])
        return self.features[chosen.to(self.device)], self.sides[chosen].to(self.device)

    def state(self) -> dict[str, Tensor]:
        return {"features": self.features.cpu(), "sides": self.sides, "steps": self.steps}

    def load(self, state: dict[str, Tensor]) -> None:
        self.features = state["features"].to(self.device)
        self.sides, self.steps = state["sides"], state["steps"]
