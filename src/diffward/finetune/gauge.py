"""The privacy gauge: what a look at the training's own pictures says while it runs.

Members and validation pictures under the same fixed (t, eps) pairs, with and without the adapter:
the validation loss, and how well the calibrated error tells the two apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.finetune.method import Method, Run
from diffward.metrics.roc import auc, delong_ci
from diffward.models.pairs import Pairs

if TYPE_CHECKING:
    from diffward.models.features import Features


@dataclass(frozen=True)
class Reading:
    """One look. Losses are means over pictures and pairs; `auc` is of the calibrated gain, members high."""

    step: int
    member_loss: float
    validation_loss: float
    base_validation_loss: float
    auc: float
    auc_ci95: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.auc_ci95
        return (
            f"validation {self.validation_loss:.4f}, AUC {self.auc:.2f} ({low:.2f} to {high:.2f})"
        )


class Gauge:
    """Reads members against validation pictures; made before the first step, which is when the base is read."""

    def __init__(self, run: Run) -> None:
        assert run.auxiliary is not None
        options, some = run.settings.gauge, run.settings.gauge.pictures
        self.run, self.pairs = run, Pairs.draw(run.denoiser, options.pairs, options.seed)
        self._sides = (
            (run.features, run.auxiliary.gauge_members[:some]),
            (run.auxiliary.validation, torch.arange(len(run.auxiliary.validation))[:some]),
        )
        # Nothing has been trained yet: these are the base's.
        self._base = [self._errors(*side) for side in self._sides]

    def read(self, step: int) -> Reading:
        """Look at the weights as they are after `step` steps."""
        errors = [self._errors(*side) for side in self._sides]
        members, validation = (
            (b - e).mean(axis=1) for b, e in zip(self._base, errors, strict=True)
        )
        low, high = delong_ci(members, validation)
        return Reading(
            step, float(errors[0].mean()), float(errors[1].mean()), float(self._base[1].mean()),
            auc(members, validation), (low, high),
        )  # fmt: skip

    def _errors(self, features: Features, rows: Tensor) -> np.ndarray:
        """Mean squared error (n, K) of each picture under each pair."""
        denoiser = self.run.denoiser

        def adapted(rows: Tensor) -> Tensor:
            return denoiser.condition([features.captions[int(row)] for row in rows])

        conditioning = adapted if self.run.settings.text_encoder else None
        found = self.pairs.errors(denoiser, features, rows, conditioning=conditioning)
        return found.double().numpy()


class Watch:
    """Takes the readings when they are due, asks the method what they mean, keeps the best weights."""

    def __init__(self, run: Run, method: Method) -> None:
        """
        Raises:
            InputError: readings are asked for, but there are no pictures to read.
        """
        options = run.settings.gauge
        asked = options.every or options.stop_auc
        if asked and run.auxiliary is None:
            raise InputError(
                "--gauge compares members with pictures that do not train; hold some out with --holdout "
                "or --holdout-data"
            )
        wanted = run.auxiliary is not None and (asked or method.needs_gauge)
        self.every = (options.every or max(1, run.total // 20)) if wanted else 0
        self.run, self.method = run, method
        self.gauge = Gauge(run) if wanted else None
        self.readings: list[Reading] = []
        self.stopped = False
        self.kept_at: int | None = None
        self._kept: list[Tensor] = []

    def look(self, step: int) -> bool:
        """Read if a reading is due after `step` steps; gives whether the run should end here."""
        if self.gauge is None or self.stopped:
            return self.stopped
        last = self.readings[-1].step if self.readings else -1
        if (step % self.every and step < self.run.total) or step == last:
            return False
        reading = self.gauge.read(step)
        self.readings.append(reading)
        verdict, most = self.method.read(reading), self.run.settings.gauge.stop_auc
        if verdict == "keep" or (most and reading.auc <= most and verdict == "go"):
            self.kept_at = step
            self._kept = [p.detach().clone() for p in self.run.parameters]
        self.stopped = verdict == "stop" or bool(most and reading.auc > most)
        return self.stopped

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights that were kept in place of the last ones, if there are any."""
        for parameter, value in zip(self.run.parameters, self._kept, strict=False):
            parameter.copy_(value)

    def told(self) -> str:
        return str(self.readings[-1]) if self.readings else ""

    def state(self) -> dict[str, Any]:
        return {
            "readings": [asdict(r) for r in self.readings],
            "stopped": self.stopped,
            "kept_at": self.kept_at,
            "kept": [value.cpu() for value in self._kept],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.readings = [Reading(**r) for r in state["readings"]]
        self.stopped, self.kept_at = state["stopped"], state["kept_at"]
        self._kept = list(state["kept"])
