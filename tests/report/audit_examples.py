"""An audit's figures made up from seeds, for the tests of the pages."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffward.membership.statistics import summarise

PNG = "data:image/png;base64,iVBORw0KGgo="
LEAKS = [
    {"key": "ss_tag_frequency", "reveals": "9 training tags", "category": "captions"},
    {"key": "ss_steps", "reveals": "steps trained: 100", "category": "counts"},
]
SUBJECT = {
    "path": "loras/anna.safetensors",
    "sha256": "3f" * 32,
    "format": "kohya",
    "base_family": "sd1",
    "rank": 8,
    "modules": 32,
    "parameters": 1_234_567,
    "extra": "dropped",
}
PROVENANCE = {"diffward": "0.1.0", "device": "cpu", "seeds": [0], "config": {"base": "mini"}}


def audit(
    shift: float = 2.0,
    n: int = 40,
    names: tuple[str, ...] = ("loss", "calibrated"),
    **controls: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(attacks, per_image) of n members and n non-members, `shift` apart."""
    rng = np.random.default_rng(0)
    member = np.arange(2 * n) < n
    scores = {name: rng.normal(size=2 * n) + shift * member for name in names}
    attacks = {
        name: {
            **summarise(values[member], values[~member]),
            "access": "weights, captions",
            "queries_per_image": 32,
            "controls": {
                "base_model_auc": 0.52,
                "base_model_ok": True,
                "blind_auc": 0.47,
                "blind_ok": True,
                **controls,
            },
        }
        for name, values in scores.items()
    }
    per_image = {
        "file": [f"portrait_{i:03d}.png" for i in range(2 * n)],
        "sha256": [f"{i:064x}" for i in range(2 * n)],
        "member": member.tolist(),
        "scores": {name: values.tolist() for name, values in scores.items()},
        "thumbnails": [PNG] * (2 * n),
    }
    return attacks, per_image
