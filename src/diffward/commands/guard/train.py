from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, get_type_hints

from diffward.commands.train import train as train_without
from diffward.finetune.settings import Settings


@dataclass
class MaskedSettings(Settings):
    """Those of `diffward train`, for a fine-tuning of all weights."""

    lr: float = 1e-4
    """learning rate of AdamW; a LoRA takes ten times as much"""
    tune: str = "full"
    """full (all weights of the UNet that the mask leaves), or lora (on the modules that it leaves)"""


def train(**options: Any) -> None:
    """Fine-tune a base under a freeze mask; otherwise as `diffward train`, which says what the options are.

    The mask must be this base's. What it freezes is outside the optimizer and is the same, bit for bit, afterwards.
    Run the same command again to resume.
    """
    from diffward.errors import InputError

    if not options["mask"]:
        raise InputError("--mask is missing: give the mask of `diffward guard learn`")
    train_without(**options)


def _like_train() -> None:
    """The options of `diffward train` become those of `guard train`, with other defaults."""
    hints = {**get_type_hints(train_without), "settings": MaskedSettings, "mask": str}
    changed = {"mask": "", "out": "runs/guarded-train"}
    given = inspect.signature(train_without)
    train.__annotations__ = hints
    train.__signature__ = given.replace(  # type: ignore[attr-defined]
        parameters=[
            one.replace(annotation=hints[name], default=changed.get(name, one.default))
            for name, one in given.parameters.items()
        ]
    )
    told = inspect.getdoc(train_without) or ""
    train.__doc__ = f"{inspect.getdoc(train)}\n\n{told[told.index('Args:') :]}"


_like_train()
