"""Moment matching: members and others alike in mean and spread, without an attacker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffward.finetune.method import METHODS, Batch, Method, Run
from diffward.finetune.private import (
    auxiliary_of,
    base_errors,
    everyones,
    own_sampler,
    part,
    share_of,
)
from diffward.finetune.proxy import FLOOR

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

SPACING = 4  # steps between comparisons
KEEP = 0.9  # of the running gaps at a comparison
STREAM = 30


@METHODS.register(
    "moment",
    paper="this project; moment matching: Li et al. 2015 (arXiv 1502.02761)",
    access="-",
    cost="1 forward and backward, 1 no-grad forward of half the batch a step",
)
class Moment(Method):
    """L_i + lambda [(mean_m g - mean_o g)^2 + (std_m g - std_o g)^2] over the batch, g = log(e / e_base).

    g is the log-ratio of a picture's error to the base's under the same (t, eps); m are the first
    pictures of the batch, o pictures that do not train, under the same t's. Symmetric: members that look
    *less* known than others cost as much.

    Gradient flows through the members alone. The gap closes from the other side too, by learning the
    others; they would then be members in all but name, and what was held out would be given away.

    Few pictures make noisy gaps, and the square of noise would only shrink the spread among the members.
    So the gaps d are running means (over about 10 comparisons, one every `SPACING` steps), and the gradient
    is 2 lambda d . grad (mean_m g, std_m g). The value of the penalty is |d|^2.
    """

    needs_auxiliary = True
    options = frozenset({"privacy.weight", "privacy.share", "privacy.every"})
    default_weight = 1.0

    def start(self, run: Run) -> None:
        self.run, options = run, run.settings.privacy
        self.weight = self.default_weight if options.weight is None else options.weight
        self.period = SPACING * options.every
        self.others = auxiliary_of(run).non_members
        size = share_of(run, run.settings.batch)
        self.draw = own_sampler(run, self.others, range(len(self.others)), size, STREAM)
        # Running sum of the gaps (mean, std) and of its weights.
        self.total, self.reach = torch.zeros(2), 0.0
        self.now = (0, 0)
        self._fresh: Tensor | None = None
        run.keep_reference()

    def rows(self, step: int, micro: int) -> None:
        self.now = (step, micro)

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        errors = denoiser.errors(batch.latents, batch.t, batch.eps, batch.conditioning)
        n, (step, micro) = share_of(self.run, batch), self.now
        sides = [(self.run.features, part(batch, torch.arange(n)))]
        compares = micro == 0 and step % self.period == 0
        if compares:
            others = part(self.draw(step // self.period, 0), torch.arange(n))
            others.t = batch.t[:n]
            sides.append((self.others, others))
        base = base_errors(self.run, *sides)
        members = moments(errors[:n], base[0])
        if compares:
            with torch.no_grad():
                answers = denoiser.errors(others.latents, others.t, others.eps, others.conditioning)
                self._fresh = (members - moments(answers, base[1])).cpu()
        total, reach = self._running()
        gaps = (total / max(reach, 1e-12)).to(members)
        penalty = gaps @ gaps + 2 * gaps @ (members - members.detach())
        return errors.mean(dim=(1, 2, 3)) + self.weight * penalty

    def after_step(self, step: int) -> None:
        if self._fresh is not None:
            self._fresh = torch.stack(everyones([self._fresh])).mean(dim=0)
        (self.total, self.reach), self._fresh = self._running(), None

    def _running(self) -> tuple[Tensor, float]:
        """The running gaps, those of this step among them, and their weight."""
        if self._fresh is None:
            return self.total, self.reach
        return KEEP * self.total + (1 - KEEP) * self._fresh, KEEP * self.reach + 1 - KEEP

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "reach": self.reach}

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.reach = state["total"], float(state["reach"])

    def told(self) -> str:
        return f"gap {float(self.total[0]) / max(self.reach, 1e-12):+.3f}"

    def facts(self) -> dict[str, str]:
        return {"ss_privacy_method": "moment", "ss_privacy_weight": f"{self.weight:g}"}


def moments(errors: Tensor, base: Tensor) -> Tensor:
    """Mean and standard deviation (2,) over samples of g = log(e + d) - log(e_base + d), e meant over (C, h, w)."""
    g = (errors.mean(dim=(1, 2, 3)) + FLOOR).log() - (base.mean(dim=(1, 2, 3)) + FLOOR).log()
    return torch.stack([g.mean(), (g.var(correction=0) + FLOOR**2).sqrt()])
