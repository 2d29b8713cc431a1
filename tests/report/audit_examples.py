"""Audits made up from seeds, for the tests of the verdict and of the pages, and for looking at them:

python -m tests.report.audit_examples FOLDER [--refused | --nothing | --one]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from diffward.membership.statistics import holm, membership_p_value, summarise

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
CONTROLS = {
    "base_model_auc": 0.52,
    "base_model_ok": True,
    "base_model_reason": "at chance",
    "blind_auc": 0.47,
    "blind_ok": True,
    "blind_reason": "at chance",
}
# Twenty attacks and how far apart each sets members from others, in standard deviations.
TWENTY = {
    "loss": 0.9, "loss_mc": 1.1, "calibrated": 1.5, "clid": 1.9, "clid_mc": 2.0, "pfami": 0.8, "secmi": 0.7,
    "pia": 0.6, "pian": 0.5, "sima": 0.4, "gradient_norm": 1.2, "gradient_cosine": 1.0, "crop": 0.3,
    "caption_free": 0.6, "cdi": 1.6, "ratio": 1.3, "steps": 0.2, "late": 0.1, "early": -0.2, "spread": 0.0,
}  # fmt: skip
EXPOSURE = {"passes": 120.0, "steps": 720, "source": "run.json"}
TOGETHER = {"p_value": 3e-6, "pictures_needed": 9, "alpha": 0.01}
EPSILON = {
    "attack": "calibrated", "epsilon": 2.13, "delta": 1e-5, "confidence": 0.95, "guesses": 60, "correct": 57,
    "canaries": 96,
}  # fmt: skip


def figures(
    scores: dict[str, np.ndarray], member: np.ndarray, **controls: Any
) -> dict[str, dict[str, Any]]:
    """The figures of attacks from their scores, as an audit makes them."""
    p_values = {name: membership_p_value(s[member], s[~member]) for name, s in scores.items()}
    adjusted = holm(p_values)
    return {
        name: {
            **summarise(values[member], values[~member]),
            "p_value": p_values[name],
            "p_holm": adjusted[name],
            "access": "grey box, with the base model",
            "queries_per_image": 32,
            "controls": {**CONTROLS, **controls},
        }
        for name, values in scores.items()
    }


def membership_of(attacks: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The `membership` argument of `build_report` around the figures of attacks."""
    return {
        "attacks": attacks,
        "skipped": {},
        "captions": "known",
        "evaluations_per_image": {"made": 48.0, "one_by_one": 96.0},
        "exposure": None,
        "dataset_inference": None,
        "epsilon": None,
        **changes,
    }


def audit(
    shift: float = 2.0,
    n: int = 40,
    names: tuple[str, ...] = ("loss", "calibrated"),
    **controls: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(membership, per_image) of n members and n non-members, `shift` apart."""
    rng = np.random.default_rng(0)
    member = np.arange(2 * n) < n
    scores = {name: rng.normal(size=2 * n) + shift * member for name in names}
    return membership_of(figures(scores, member, **controls)), per_image_of(scores, member)


def audit_of_twenty(
    share: float = 1.0, n: int = 48, **controls: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(membership, per_image) of twenty attacks with all that an audit can find beside them.

    `share`: of the distances in `TWENTY`; 0 for a LoRA that learned nothing.
    """
    rng = np.random.default_rng(1)
    member = np.arange(2 * n) < n
    common = rng.normal(size=2 * n)
    scores = {
        name: (common + rng.normal(size=2 * n)) / np.sqrt(2) + share * shift * member
        for name, shift in TWENTY.items()
    }
    attacks = figures(scores, member, **controls)
    for index, attack in enumerate(attacks.values()):
        attack["queries_per_image"] = (1, 16, 32, 64)[index % 4]
        if attack["controls"]["base_model_ok"]:
            attack["controls"]["base_model_auc"] = 0.5 + 0.004 * index
    membership = membership_of(
        attacks,
        skipped={"lira": "needs shadow LoRAs (--shadows)", "rmia": "needs shadow LoRAs (--shadows)"},
        evaluations_per_image={"made": 212.0, "one_by_one": 1480.0},
        exposure=EXPOSURE,
        dataset_inference=TOGETHER if share else {**TOGETHER, "p_value": 0.4, "pictures_needed": None},
        epsilon=EPSILON if share else {**EPSILON, "epsilon": 0.0, "guesses": 40, "correct": 22},
    )  # fmt: skip
    return membership, per_image_of(scores, member, pictures=True)


def per_image_of(
    scores: dict[str, np.ndarray], member: np.ndarray, pictures: bool = False
) -> dict[str, Any]:
    size = len(member)
    return {
        "file": [f"portrait_{i:03d}.png" for i in range(size)],
        "sha256": [f"{i:064x}" for i in range(size)],
        "member": member.tolist(),
        "scores": {name: values.tolist() for name, values in scores.items()},
        "thumbnails": _drawn(size) if pictures else [PNG] * size,
    }


def _drawn(count: int) -> list[str]:
    """Small pictures to look at."""
    from diffward.report.audit import thumbnail

    rng = np.random.default_rng(2)
    coarse = rng.integers(40, 230, (count, 4, 4, 3))
    return [thumbnail(c.repeat(16, 0).repeat(16, 1).astype(np.uint8)) for c in coarse]


def main(folder: Path, *flags: str) -> None:
    from diffward.report.build import build_report, write_report
    from diffward.report.terminal import show_report

    subject: dict[str, Any] = {**SUBJECT, "rank": 64}
    if "--refused" in flags:
        found = audit_of_twenty(
            base_model_auc=0.71, base_model_ok=False, blind_auc=0.83, blind_ok=False
        )
    elif "--nothing" in flags:
        found = audit_of_twenty(share=0.0)
    elif "--one" in flags:
        found = audit(names=("calibrated",), n=12)
    else:
        found = audit_of_twenty()
    report = build_report(subject, LEAKS, found[0], PROVENANCE)
    print(write_report(report, found[1], folder)[0])
    show_report(report)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
