"""A loss that is not finite ends a run, with the step and the pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffward.errors import TrainingError

if TYPE_CHECKING:
    from diffward.models.features import Features


def check_finite(each: Tensor, rows: Tensor, features: Features, where: str, option: str) -> None:
    """Raises `TrainingError` unless every loss (n,), of pictures `rows` (n,), is finite.

    Args:
        where: what was being done: "step 3".
        option: the learning rate on the command line, which is what to lower; "" where nothing was trained.
    """
    if torch.isfinite(each).all():
        return
    finite = torch.isfinite(each.detach()).tolist()
    bad = [features.names[r] for r, ok in zip(rows.tolist(), finite, strict=True) if not ok]
    lower = f"lower {option}, or " if option else ""
    raise TrainingError(
        f"{where}: the loss is not finite for {', '.join(bad)}; {lower}look at these pictures"
    )
