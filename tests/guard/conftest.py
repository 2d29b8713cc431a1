"""A tiny base with two domains of a few pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def domains(denoiser: Any) -> tuple[Any, Any]:
    """Illegal and innocent features: random latents, one mean each, so that they can be told apart."""
    from diffward.models.features import Features, encode_captions

    def make(count: int, shift: float, word: str, seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        latents = torch.randn((count, *denoiser.latent_shape), generator=g) * 0.3 + shift
        captions = [f"a {word} cup" if i % 2 else f"a {word}" for i in range(count)]
        embeddings, index = encode_captions(denoiser, captions, cache=False)
        return Features(latents, captions, [f"{word}{i}" for i in range(count)], embeddings, index)

    return make(6, 1.0, "red", 0), make(5, -1.0, "blue", 1)


@pytest.fixture
def subject(denoiser: Any, domains: Any, tmp_path: Path) -> Callable[..., Any]:
    """`subject(work="a", updates=3)`: what a guard works on, with settings that take a second."""
    from diffward.guard import GuardSettings, Subject

    def make(work: str | None = "work", **given: Any) -> Any:
        few = {
            "tune_steps": 20,
            "updates": 4,
            "interval": 2,
            "batch": 4,
            "user_lr": 3e-3,
            "budget": 0.3,
        }
        settings = GuardSettings(**{**few, **given})
        return Subject(denoiser, *domains, settings, tmp_path / work if work else None)

    return make
