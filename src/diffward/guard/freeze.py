"""FreezeAsGuard's bilevel learning of the mask, over all budgets at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffward.finetune.sampler import generator
from diffward.guard.bilevel import Bilevel, run_bilevel
from diffward.guard.losses import DOMAINS, gains
from diffward.guard.subject import BOTH, GUARDS, MASKS, TUNING, Found, Subject

if TYPE_CHECKING:
    from diffward.guard.settings import GuardSettings

_BUDGETS = 70  # stream of random numbers
UPDATES = frozenset({"updates", "interval"})
OURS = frozenset({"mask_lr", "illegal_weight", "innocent_weight"})
_EDGE = 0.02  # the budgets' distance from none and all
_LIMIT = 20.0  # of a reading, in units of an even share of all gains


@GUARDS.register(
    "freeze",
    paper="Huang & Gao 2024 (arXiv 2405.17472), eqs. 2-12; budgets at random, units and attacker's optimizer are ours",
    access="base, pictures of both domains",
    cost="full fine-tuning, then updates x interval steps", domains=BOTH,
    options=MASKS | TUNING | UPDATES | {"user_optimizer", "temperature", "paper", *OURS}, not_published=OURS | {"user_optimizer"},
)  # fmt: skip
def freeze(subject: Subject) -> Found:
    """Learned freezing: fails in the forbidden domain, works in the allowed one (bilevel)."""
    if subject.settings.paper:
        from diffward.guard.published import Published

        return run_bilevel(subject, Published(subject.settings, len(subject.names)))
    gained = gains(subject)
    found = run_bilevel(subject, Budgeted(subject.settings, subject.costs, gained))
    found.facts["gained_by_fine_tuning"] = dict(zip(DOMAINS, gained, strict=True))
    return found


class Budgeted(Bilevel):
    """The upper level: logits x climb along -lambda_1 dL_ill/dm + lambda_2 dL_inn/dm, at ever other budgets.

    For every update a budget u is drawn from (0, 1), and all logits are shifted by one number so that the soft
    mask uses it up exactly: sum c_i sigmoid((x_i + b) / T) = u sum c_i. It takes the place of the published
    penalty, whose first step kills half of the logits. Readings at one small budget are taken close to theta_ft,
    where the loss is flat and first order says nothing of what a frozen tensor costs; over all budgets their mean
    is the integral of the gradient from theta_ft to theta_pre (Sundararajan et al. 2017), and the ranking serves
    any budget. Each domain's readings are in units of what fine-tuning gains there, a tensor's per unit of cost.
    Scores are the logits' mean over the second half of the run.
    """

    def __init__(self, settings: GuardSettings, costs: Tensor, gained: tuple[float, float]) -> None:
        self.settings, self.gained = settings, gained
        self.costs = costs / costs.mean()
        self.x = torch.zeros(len(costs), dtype=torch.float64)
        self.kept, self.updates = torch.zeros_like(self.x), 0

    def mask(self) -> Tensor:
        g = generator(self.settings.seed, self.updates, _BUDGETS)
        return self.at(float(torch.rand((), generator=g)) * (1 - 2 * _EDGE) + _EDGE)

    def at(self, share: float) -> Tensor:
        """The soft mask (N,) whose cost is `share` of all, to rounding (bisection for the shift)."""
        temperature = self.settings.temperature
        low, high = (float(end) - 50 * temperature for end in (-self.x.max(), -self.x.min()))
        high += 100 * temperature
        for _ in range(100):
            middle = (low + high) / 2
            soft = torch.sigmoid((self.x + middle) / temperature)
            low, high = (
                (middle, high) if self.costs @ soft < share * self.costs.sum() else (low, middle)
            )
        return soft

    def update(self, illegal: Tensor, innocent: Tensor) -> None:
        given = self.settings
        ill, inn = (s / gained for s, gained in zip((illegal, innocent), self.gained, strict=True))
        pull = (given.innocent_weight * inn - given.illegal_weight * ill) * len(self.x) / self.costs
        # The smallest tensors' readings per parameter are huge, and mostly noise.
        self.x -= given.mask_lr * given.temperature * pull.clamp(-_LIMIT, _LIMIT)
        self.updates += 1
        if self.updates > given.updates // 2:
            self.kept += self.x

    def scores(self) -> Tensor:
        return self.kept / max(1, self.updates - self.settings.updates // 2)

    def state(self) -> dict[str, Any]:
        return {"x": self.x, "kept": self.kept, "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        self.x, self.kept, self.updates = state["x"], state["kept"], int(state["updates"])
