from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def features(tiny_denoiser: Callable[..., Any], pictures: Any) -> Any:
    from diffward.models.features import encode_pictures

    return encode_pictures(tiny_denoiser(), pictures, cache=False)
