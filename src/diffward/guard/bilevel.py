"""The loop that learns a mask: the user moves the weights, the publisher reads and moves the mask.

One forward and backward a domain serves both levels: its inner products with theta_pre - theta_ft are the
gradients of the mask, and the gradients themselves are the user's. First order, as in the paper: no
gradient flows through the user's steps. All draws are functions of (seed, step), so a resumed run is the
same run.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from diffward.errors import InputError, TrainingError
from diffward.files import atomic_path
from diffward.finetune.sampler import generator
from diffward.guard.both import Rows, part
from diffward.guard.effective import Effective
from diffward.guard.losses import DOMAINS, each_loss
from diffward.guard.processes import world
from diffward.guard.subject import Found, Subject
from diffward.guard.user import make_optimizer
from diffward.progress import progress

_NOISE = 90  # streams of random numbers; those of the pictures' order are below


class Bilevel(Protocol):
    """The upper level: what becomes of the readings.

    `update` takes the mean dL/dm (N,) of either domain since the last update; `mask` gives m (N,).

    Attributes:
        apart: the published order: the mask reads a batch of its own while nobody moves, then the user moves unread.
    """

    apart: ClassVar[bool] = False

    def mask(self) -> Tensor: ...
    def update(self, illegal: Tensor, innocent: Tensor) -> None: ...
    def scores(self) -> Tensor: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class Simulation:
    """The two domains, drawn and noised step by step."""

    def __init__(self, subject: Subject, effective: Effective) -> None:
        self.subject, self.effective = subject, effective
        settings = subject.settings
        half = settings.batch // 2
        sizes = half, settings.batch - half
        self.domains = subject.illegal, subject.innocent
        self._rows = [
            Rows(len(domain), size, settings.seed, 2 + i)
            for i, (domain, size) in enumerate(zip(self.domains, sizes, strict=True))
        ]

    def loss(self, step: int, which: int) -> Tensor:
        """Mean loss of a domain (0 illegal, 1 innocent) at a step, with gradient.

        Raises:
            TrainingError: it is not finite; with the step and the pictures.
        """
        features, denoiser = self.domains[which], self.subject.denoiser
        rows = self._rows[which](step)
        g = generator(self.subject.settings.seed, step, _NOISE + which)
        count = denoiser.schedule.config.num_train_timesteps
        # One t in every stratum of the schedule: less noise in the readings than n free draws.
        strata = torch.randperm(len(rows), generator=g)
        t = ((strata + torch.rand(len(rows), generator=g)) * count / len(rows)).long()
        t.clamp_(max=count - 1)  # in fp32 the sum may round up to the end
        eps = torch.randn((len(rows), *denoiser.latent_shape), generator=g)
        own, name = part(), DOMAINS[which]
        return each_loss(
            denoiser, features, rows[own], t[own], eps[own], f"step {step} of the simulated user, {name} domain", "--user-lr"
        ).mean()  # fmt: skip

    def step(self, step: int) -> tuple[Tensor, Tensor, list[float]]:
        """A step of the user on either domain; gives the readings of both, and both losses."""
        found: list[Tensor] = [torch.empty(0), torch.empty(0)]
        losses = [0.0, 0.0]
        # Who comes first changes, lest the second's readings always be those of other weights.
        for which in (0, 1) if step % 2 == 0 else (1, 0):
            loss = self.loss(step, which)
            losses[which] = float(loss.detach())
            found[which] = self.effective.backward(loss)
        return found[0], found[1], losses


def run_bilevel(subject: Subject, upper: Bilevel) -> Found:
    """Learn for `settings.updates` updates; resumes. The base's weights are put back.

    Raises:
        TrainingError: a loss was not finite.
        InputError: the checkpoint is another run's.
    """
    settings, unet = subject.settings, subject.denoiser.unet
    _ = subject.denoiser.unet_identity  # of the base: once theta is in the UNet it would be another
    user = make_optimizer("sgd" if settings.paper else settings.user_optimizer)
    base, tuned = subject.base, subject.tuned
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    try:
        # theta_ft was reached at half that rate on average (cosine).
        rate = settings.user_lr * (1.0 if settings.paper else 0.5)
        effective = Effective(unet, base, tuned, upper.mask(), user, rate)
        done, losses = _resume(subject, upper, effective)
        effective.set_mask(upper.mask())
        simulation = Simulation(subject, effective)
        with effective, progress("learn", settings.updates, done) as bar:
            while done < settings.updates:
                losses = one_update(simulation, upper, done)
                effective.set_mask(upper.mask())
                done += 1
                bar.advance(f"loss illegal {losses[0]:.4f}, innocent {losses[1]:.4f}")
                if done % settings.checkpoint_every == 0 or done == settings.updates:
                    _save(subject, upper, effective, done, losses)
    finally:
        if settings.gradient_checkpointing:
            unet.disable_gradient_checkpointing()
        subject.restore()
    return Found(
        scores=upper.scores(), facts={"user_losses": {"illegal": losses[0], "innocent": losses[1]}}
    )


def one_update(simulation: Simulation, upper: Bilevel, done: int) -> list[float]:
    """`interval` steps of the user, each of them read, then one of the mask; gives the mean losses."""
    count = simulation.subject.settings.interval
    first = done * (count + upper.apart)
    if upper.apart:
        illegal, innocent = (
            simulation.effective.backward(simulation.loss(first, i), move=False) for i in (0, 1)
        )
        _update(upper, illegal, innocent, done)
        simulation.effective.set_mask(upper.mask())
        first += 1
    steps = [simulation.step(first + i) for i in range(count)]
    if not upper.apart:
        illegal, innocent = (
            torch.stack(some).mean(0) for some in ([s[0] for s in steps], [s[1] for s in steps])
        )
        _update(upper, illegal, innocent, done)
    return [sum(s[2][i] for s in steps) / count for i in (0, 1)]


def _identity(subject: Subject) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    free = ("checkpoint_every", "cost_weight", "uce", "imma")
    told = {k: v for k, v in asdict(subject.settings).items() if k not in free}
    data = {"illegal": subject.illegal.digest(), "innocent": subject.innocent.digest()}
    return {**told, **data, "base": subject.denoiser.unet_identity, "processes": world()[0]}


def _resume(subject: Subject, upper: Bilevel, effective: Effective) -> tuple[int, list[float]]:
    path = subject.work / "learning.pt" if subject.work else None
    if path is None or not path.exists():
        return 0, [0.0, 0.0]
    hint = "choose another --out, or delete the file to start anew"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        user = _moved(state["user"], subject.denoiser.device)
        told, done = dict(state["run"]), int(state["done"])
        upper_state, tuned = dict(state["upper"]), dict(state["tuned"])
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a checkpoint; {hint}") from error
    own = _identity(subject)
    if changed := sorted(k for k in own.keys() | told.keys() if own.get(k) != told.get(k)):
        raise InputError(f"{path}: is of a run with another {', '.join(changed)}; {hint}")
    upper.load(upper_state)
    effective.user.load(user)
    for name, value in tuned.items():
        effective.tuned[name].copy_(value)
    return done, list(state["losses"])


def _save(
    subject: Subject, upper: Bilevel, effective: Effective, done: int, losses: list[float]
) -> None:
    if subject.work is None or world()[1]:
        return
    state = {
        "run": _identity(subject), "done": done, "losses": losses, "upper": upper.state(),
        "user": effective.user.state(), "tuned": {n: t.cpu() for n, t in effective.tuned.items()},
    }  # fmt: skip
    with atomic_path(subject.work / "learning.pt") as temporary:
        torch.save(state, temporary)


def _update(upper: Bilevel, illegal: Tensor, innocent: Tensor, done: int) -> None:
    """Raises `TrainingError` before readings that are not finite reach the logits, and those a checkpoint."""
    if not (torch.isfinite(illegal).all() and torch.isfinite(innocent).all()):
        raise TrainingError(
            f"update {done} of the mask: the simulated user's weights are not finite any more; lower --user-lr"
        )
    upper.update(illegal, innocent)


def _moved(state: Any, device: torch.device) -> Any:
    """Tensors in nested dictionaries and lists, on a device."""
    if isinstance(state, dict):
        return {key: _moved(value, device) for key, value in state.items()}
    if isinstance(state, list):
        return [_moved(value, device) for value in state]
    return state.to(device) if isinstance(state, Tensor) else state
