"""From two domains to an artefact: run a guard, meet the budget exactly, look at the hard mask again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffward.errors import InputError
from diffward.guard.budget import choose, share_of
from diffward.guard.losses import losses_of
from diffward.guard.mask import FreezeMask
from diffward.guard.options import settings_read
from diffward.guard.subject import GUARDS, Found, Subject
from diffward.models.parameters import parameters_of


def learn_mask(subject: Subject, method: str, domains: dict[str, Any] | None = None) -> FreezeMask:
    """The mask that a guard finds, with its scores.

    Args:
        method: one of `GUARDS` that scores tensors.
        domains: what may be said of the pictures: words and numbers.

    Raises:
        InputError: the budget freezes nothing or everything, or the guard edits weights instead.
        TrainingError: a loss of the simulated fine-tuning was not finite.
    """
    return mask_from(subject, method, GUARDS[method].obj(subject), domains)


def mask_from(
    subject: Subject, method: str, found: Found, domains: dict[str, Any] | None = None
) -> FreezeMask:
    """The artefact of what a guard found: the budget met exactly, the losses under the hard mask looked at again.

    Raises:
        InputError: as `learn_mask`.
    """
    if found.scores is None:
        raise InputError(
            f"guard {method} edits weights and gives no mask; it has nothing to freeze"
        )
    scores = cost_aware(found.scores, subject)
    frozen = choose(scores, subject.costs, subject.settings.budget)
    facts: dict[str, Any] = {
        "method": method, "base": subject.denoiser.public_name, "base_identity": subject.denoiser.unet_identity,
        "budget": {
            "share": subject.settings.budget, "by": subject.settings.by,
            "reached": share_of(frozen, subject.costs),
        },
        "domains": domains or {}, "settings": settings_read(method, subject.settings), "found": found.facts,
    }  # fmt: skip
    if "tuned" in vars(subject):
        facts["losses"] = hard_losses(subject, frozen)
    return FreezeMask.of(parameters_of(subject.denoiser.unet), frozen, scores, facts)


def cost_aware(scores: Tensor, subject: Subject) -> Tensor:
    """Scores with `cost_weight` of each tensor's training cost beside them, both standardised."""
    weight = subject.settings.cost_weight
    if not weight:
        return scores
    from diffward.guard.cost import training_costs

    def standard(values: Tensor) -> Tensor:
        return (values - values.mean()) / values.std().clamp_min(1e-300)

    return standard(scores) + weight * standard(training_costs(subject.denoiser).log())


def hard_losses(subject: Subject, frozen: Tensor) -> dict[str, dict[str, float]]:
    """Losses of both domains at the base, fine-tuned, and fine-tuned with the frozen tensors taken back."""
    mixed = {
        name: (subject.base if one else subject.tuned)[name]
        for name, one in zip(subject.names, frozen.tolist(), strict=True)
    }
    weights = {"base": {}, "tuned": subject.tuned, "masked": mixed}
    return {name: losses_of(subject, some) for name, some in weights.items()}
