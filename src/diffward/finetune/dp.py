"""Differential privacy: DP-SGD on the LoRA factors."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.finetune.accounting import plan, rounded_up
from diffward.finetune.method import METHODS, Batch, Method, Run
from diffward.finetune.per_sample import PerSample
from diffward.finetune.secret import Secret
from diffward.finetune.settings import DP

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser


@METHODS.register(
    "dp",
    paper="DP-SGD: Abadi et al. 2016; opacus: Yousefpour et al. 2021",
    access="-",
    cost="1.2 plain steps, and a gradient for each picture of a pass in memory",
)
class DPSGD(Method):
    """DP-SGD: clips each picture's gradient and adds noise; epsilon bounds what any attack can tell.

    A step moves by AdamW of (sum_i clip(g_i) + N(0, (noise clip)^2)) / (q n), over a Poisson draw: each of the
    n pictures with chance q = batch accumulate / n, whatever the others do (Abadi et al. 2016, algorithm 1;
    weight decay and AdamW work on what is private already). The bound is on a record, one picture
    with its caption, added or removed.

    It holds towards those who do not know the draws: which pictures, their t and eps, the added noise. All
    of them follow from a secret that is in the checkpoint and nowhere else, so the checkpoint is as private as
    the pictures. Not covered: what the progress line, logs, run.json and the gauge tell of the pictures.
    """

    own_clipping: ClassVar[bool] = True
    options = frozenset(f"dp.{field.name}" for field in fields(DP))
    _factors: PerSample | None = None

    def start(self, run: Run) -> None:
        _refuse(run)
        self.run, self.steps = run, 0
        self.per_step = run.settings.batch * run.settings.accumulate
        self.ledger = plan(run.settings.dp, self.per_step, len(run.order), run.total)
        self.secret = Secret()
        self._drawn: tuple[int, Tensor] = (-1, torch.empty(0))
        self._place, self._passes = (0, 0), run.settings.accumulate
        adapter = run.denoiser.trainable_adapter
        assert adapter is not None  # a LoRA is all that dp trains
        self._factors = PerSample(
            [f["default"] for x in adapter.layers().values() for f in (x.lora_A, x.lora_B)]
        )

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        from diffward.finetune.noisy import NoisyOptimizer

        self._optimizer = NoisyOptimizer(
            optimizer,
            lambda count, device: self.secret.normal(count, device, "noise", self._place[0]),
            multiplier=self.ledger.noise,
            clip=self.run.settings.dp.clip,
            expected=self.per_step,
        )
        return self._optimizer

    def passes(self, step: int) -> int:
        """Forward passes of this step: none has more than a quarter over `batch`, however large the draw."""
        most = self.run.settings.batch * 5 // 4
        self._passes = max(1, math.ceil(len(self._draw(step)) / most))
        return self._passes

    def rows(self, step: int, micro: int) -> Tensor:
        """The part of the step's Poisson draw for this pass."""
        if micro:
            self._optimizer.clip_and_accumulate()
        self._place = (step, micro)
        return self._draw(step).tensor_split(self._passes)[micro]

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """The plain loss (B,), at t and noise of our own.

        The loop's follow from `seed` and the place in the batch. Who knows the seed would see that one
        picture less changes those of the pictures behind it.
        """
        rng, size = self.secret.stream("loss", *self._place), len(batch.t)
        levels = denoiser.schedule.config.num_train_timesteps
        t = torch.from_numpy(rng.integers(levels, size=size)).to(batch.t)
        eps = torch.from_numpy(rng.standard_normal(batch.eps.shape, dtype=np.float32))
        errors = denoiser.errors(batch.latents, t, eps.to(batch.eps), batch.conditioning)
        loss = errors.mean(dim=(1, 2, 3))
        # The loop's means and weights must not scale the gradient of a picture's own loss.
        loss.register_hook(torch.ones_like)
        self._optimizer.pictures = size
        return loss

    def after_step(self, step: int) -> None:
        self.steps = step + 1

    def state(self) -> dict[str, Any]:
        return {"secret": self.secret.state(), "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.secret, self.steps = Secret.of(state["secret"]), state["steps"]
        self._drawn = (-1, torch.empty(0))

    def told(self) -> str:
        """A bound on what was spent so far; what is counted at the end is less."""
        spent = min(self.run.settings.dp.epsilon or math.inf, self.ledger.bound(self.steps))
        return f"eps <= {spent:.2g} (delta {self.ledger.delta:.0e})"

    def facts(self) -> dict[str, str]:
        """The guarantee. Without the noise, which with epsilon tells how many pictures there are."""
        return {
            "ss_privacy_method": "dp-sgd",
            "ss_privacy_epsilon": rounded_up(self.ledger.epsilon(self.steps)),
            "ss_privacy_delta": f"{self.ledger.delta:g}",
            "ss_privacy_unit": "record, add/remove",
            "ss_privacy_accountant": self.ledger.accountant,
            "ss_privacy_clip": f"{self.run.settings.dp.clip:g}",
        }

    def finish(self) -> None:
        if self._factors:
            self._factors.remove()

    def _draw(self, step: int) -> Tensor:
        if self._drawn[0] != step:
            chances = self.secret.stream("rows", step).random(len(self.run.order))
            drawn = torch.from_numpy(np.flatnonzero(chances < self.ledger.rate))
            self._drawn = (step, torch.tensor(self.run.order)[drawn])
        return self._drawn[1]


def _refuse(run: Run) -> None:
    """What would make the bound false, or is not made.

    Raises:
        InputError: says which, and what to leave out.
    """
    from importlib.util import find_spec

    from accelerate import PartialState

    settings = run.settings
    if find_spec("opacus") is None:
        raise InputError("method dp needs opacus: pip install 'diffward[dp]'")
    for wrong, reason in (
        (settings.tune != "lora", "trains a LoRA only: leave out --tune full"),
        (settings.flip, "counts a picture and its mirror image as one: leave out --flip"),
        (len(set(run.order)) < len(run.order), "counts each picture once: no folders with repeats"),
        (settings.drop_caption > 0, "keeps all draws secret: leave out --drop-caption"),
        (
            settings.gauge.stop_auc > 0,
            "does not bound what the gauge's choice tells: leave out --gauge.stop-auc",
        ),
        (PartialState().num_processes > 1, "trains in one process"),
    ):
        if wrong:
            raise InputError(f"method dp {reason}")
    seen: dict[bytes, str] = {}
    for name, latent in zip(run.features.names, run.features.latents.cpu().numpy(), strict=True):
        if (same := seen.setdefault(latent.tobytes(), name)) != name:
            raise InputError(
                f"method dp bounds what one picture tells, but {same} and {name} are the same: keep one"
            )
