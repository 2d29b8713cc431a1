"""A guard reads the options it names and no other; what it worked with is what its file tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffward.errors import InputError, TrainingError
from diffward.guard import GUARDS, GuardSettings
from diffward.guard.bilevel import Simulation
from diffward.guard.learn import learn_mask
from diffward.guard.options import check_options, reads
from diffward.guard.settings import ImmaOptions, UceOptions

Make = Callable[..., Any]
OTHER: dict[str, Any] = {
    "budget": 0.6, "by": "tensors", "cost_weight": 3.0, "tune_steps": 9, "updates": 7, "interval": 3, "batch": 2,
    "user_lr": 8e-3, "user_optimizer": "sgd", "mask_lr": 0.3, "temperature": 0.7, "illegal_weight": 3.0,
    "innocent_weight": 0.2,
}  # fmt: skip
KINDS = [
    *((name, False) for name in GUARDS.names() if name not in ("uce", "imma")), ("freeze", True)
]  # fmt: skip


@pytest.mark.parametrize(("method", "paper"), KINDS)
def test_what_it_does_not_read_changes_nothing(subject: Make, method: str, paper: bool) -> None:
    read = reads(method, GuardSettings(paper=paper))
    unread = {name: value for name, value in OTHER.items() if name not in read}
    one, other = (
        learn_mask(subject(f"{i}", paper=paper, **given), method)
        for i, given in enumerate(({}, unread))
    )
    assert torch.equal(one.scores, other.scores) and one.frozen == other.frozen
    told = one.facts["settings"]
    assert set(told) == read - {"concepts", "guide"} and told == other.facts["settings"]


@pytest.mark.parametrize(("method", "paper"), KINDS)
def test_what_it_reads_changes_the_mask(subject: Make, method: str, paper: bool) -> None:
    usual = learn_mask(subject("usual", paper=paper), method)
    for name in sorted(set(OTHER) & reads(method, GuardSettings(paper=paper))):
        other = learn_mask(subject(f"other-{name}", paper=paper, **{name: OTHER[name]}), method)
        same = torch.equal(usual.scores, other.scores) and usual.frozen == other.frozen
        assert not same, name


@pytest.mark.parametrize(
    ("method", "given", "words", "says"),
    [
        ("freeze", {"paper": True, "illegal_weight": 5.0}, (), "--illegal-weight 5.0: guard freeze .* drop --paper"),
        ("freeze", {"paper": True, "user_optimizer": "adamw"}, (), "--user-optimizer adamw: .* drop --paper"),
        ("fisher", {"paper": True}, (), "--paper True: guard fisher .* use freeze"),
        ("random", {"mask_lr": 1.0}, (), "--mask-lr 1.0: guard random .* use freeze"),
        ("freeze", {"uce": UceOptions(lam=2.0)}, (), "--uce.lam 2.0: guard freeze .* use uce"),
        ("uce", {"imma": ImmaOptions(inner_lr=1.0)}, (), "--imma.inner-lr 1.0: guard uce .* use imma"),
        ("imma", {"budget": 0.5}, (), "--budget 0.5: guard imma does not look at it"),
        ("freeze", {}, ("cup",), r"--concepts \['cup'\]: guard freeze .* use uce"),
    ],
)  # fmt: skip
def test_what_would_steer_another_guard_is_refused(
    method: str, given: dict[str, Any], words: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InputError, match=f"^{says}"):
        check_options(method, GuardSettings(**given), words)


def test_effort_may_be_told_to_any() -> None:
    """One file of settings serves several guards."""
    shared = GuardSettings(
        tune_steps=9, updates=7, interval=3, batch=2, user_lr=1.0, gradient_checkpointing=True
    )
    for name in GUARDS.names():
        check_options(name, shared)
    check_options("uce", GuardSettings(uce=UceOptions(lam=2.0)), ["cup"], "boat")
    check_options("imma", GuardSettings(imma=ImmaOptions(batch=2)))


# --- theta_ft and the simulated user ------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["tune_steps", "pictures"])
def test_another_runs_theta_ft_is_not_taken(subject: Make, changed: str) -> None:
    assert len(subject().tuned)
    assert len(subject().tuned)  # the same one is
    other = subject(tune_steps=9) if changed == "tune_steps" else subject()
    if changed == "pictures":
        other.illegal = replace(other.illegal, latents=other.illegal.latents + 1)
    with pytest.raises(InputError, match=r"tuned.safetensors: is of a fine-tuning on other"):
        other.tuned  # noqa: B018


def test_theta_ft_that_is_not_finite_names_the_commands_option(subject: Make) -> None:
    with pytest.raises(TrainingError, match=r"^full fine-tuning on both .* lower --user-lr"):
        subject(user_lr=1e8).tuned  # noqa: B018


def test_no_timestep_is_beyond_the_schedule(subject: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """stratum + 0.99999994 is the next stratum in fp32."""
    one = subject()
    simulation = Simulation(one, None)  # type: ignore[arg-type]
    seen = []
    errors = one.denoiser.errors
    monkeypatch.setattr(
        one.denoiser, "errors", lambda latents, t, *rest: (seen.append(t), errors(latents, t, *rest))[1]
    )  # fmt: skip
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    for step in range(3):
        for which in (0, 1):
            simulation.loss(step, which)
    assert max(int(t.max()) for t in seen) == 999
