"""Pictures for the tests of the private methods."""

from __future__ import annotations

import pytest
import torch

from diffward.finetune.method import Auxiliary
from diffward.models.features import Features, encode_captions


@pytest.fixture(scope="module")
def pictures(tiny_denoiser):
    """Twenty random latents: ten to train on, ten for the auxiliary sides."""
    captions = [f"cup {i % 3}" for i in range(20)]
    latents = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Features(
        latents, captions, captions, *encode_captions(tiny_denoiser(), captions, cache=False)
    )


@pytest.fixture(scope="module")
def features(pictures):
    return pictures.of(range(10))


@pytest.fixture(scope="module")
def auxiliary(pictures):
    return Auxiliary(
        torch.tensor([1, 4, 6]), pictures.of(range(10, 14)), torch.tensor([0, 2, 5, 9]), pictures.of(range(14, 20))
    )  # fmt: skip
