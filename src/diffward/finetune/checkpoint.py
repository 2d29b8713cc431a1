"""What a run needs to go on as if it had never stopped.

A checkpoint holds optimizer moments and a hash of the data: it belongs to the trainer, and is
never part of the model file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from diffward.errors import InputError
from diffward.files import atomic_path


class Stateful(Protocol):
    """Something else that a resumed run needs."""

    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


class Checkpoint:
    """Saves and restores trained parameters, optimizer state, losses and `parts`. `path` None does nothing."""

    def __init__(
        self,
        path: Path | None,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        run: dict[str, Any],
        parts: Mapping[str, Stateful] | None = None,
    ) -> None:
        self.path, self.parameters, self.optimizer, self.run = path, parameters, optimizer, run
        self.parts = dict(parts or {})

    def save(self, step: int, losses: list[float]) -> None:
        if self.path is None:
            return
        state = {
            "run": self.run,
            "step": step,
            "losses": losses,
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "parts": {name: part.state() for name, part in self.parts.items()},
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)

    def load(self) -> tuple[int, list[float]]:
        """The step to go on from and the losses so far; (0, []) where there is no checkpoint.

        Raises:
            InputError: the checkpoint is another run's, or unreadable.
        """
        if self.path is None or not self.path.exists():
            return 0, []
        hint = "choose another --out, or delete the file to start anew"
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            run, parameters = dict(state["run"]), state["parameters"]
            step, losses, moments = int(state["step"]), list(state["losses"]), state["optimizer"]
            parts = {name: state["parts"][name] for name in self.parts}
        except Exception as error:
            raise InputError(f"{self.path}: cannot be read as a checkpoint; {hint}") from error
        changed = sorted(k for k in self.run.keys() | run.keys() if self.run.get(k) != run.get(k))
        if changed:
            raise InputError(f"{self.path}: is of a run with another {', '.join(changed)}; {hint}")
        with torch.no_grad():
            for parameter, value in zip(self.parameters, parameters, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(moments)
        for name, part in self.parts.items():
            part.load(parts[name])
        return step, losses
