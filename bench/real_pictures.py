"""Real photographs on `mini`: is an over-trained LoRA caught, and are the controls at chance?

Needs the test data beside the checkout (`../shared/data`, or where DIFFWARD_DATA points): photographs
of clothes, and of single subjects with look-alikes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from bench._result import record
from bench._support import attack_rows
from diffward.data import Pictures, load_pictures, random_split
from diffward.errors import InputError
from diffward.finetune.run import WEIGHTS, run_training
from diffward.finetune.settings import Settings
from diffward.models.load import load_base
from diffward.report.audit import AuditOptions, Sides, audit_lora, sides_of_folders, sides_of_split

SEED = 0
RANK = 64
SUBJECT, LOOK_ALIKES = "dog5", ["dog", "dog2", "dog6", "dog8"]


def run(quick: bool = False) -> None:
    root = Path(os.environ.get("DIFFWARD_DATA", "../shared/data"))
    if not root.is_dir():
        raise InputError(f"{root}: no test data there; set DIFFWARD_DATA")
    n = 40 if quick else 240
    clothing = load_pictures(root / "clothing", limit=n + n // 4)
    manifest = random_split(clothing, n_members=n // 2, n_non_members=n // 2, seed=SEED)
    sides = sides_of_split(clothing, manifest)
    rows = []
    for epochs in (3.0,) if quick else (4.0, 10.0, 50.0, 200.0):
        rows += audit("clothing", clothing, sides, epochs, manifest)
    if not quick:
        own = load_pictures(root / "subjects" / SUBJECT)
        others = Pictures(
            [p for name in LOOK_ALIKES for p in load_pictures(root / "subjects" / name)]
        )
        rows += audit(f"subject {SUBJECT}", own, sides_of_folders(own, others), 200.0, None)
    record("real-pictures", rows, seeds=[SEED], quick=quick, notes=[
        "clothing: 120 members and 120 non-members, split at random; plain LoRA, rank 64 on all layers, learning rate 1e-3 falling along a cosine, batch 8",
        "subject: all pictures of one animal against pictures of look-alikes; not a random split, so the blind "
        "control may take the claim back",
    ])  # fmt: skip


def audit(
    name: str, pictures: Pictures, sides: Sides, epochs: float, manifest: Any
) -> list[dict[str, Any]]:
    """Train for `epochs` passes and audit; one row an attack."""
    denoiser = load_base("mini", device="cpu")
    settings = Settings(
        epochs=epochs,
        batch=min(8, len(pictures)),
        lr=1e-3,
        schedule="cosine",
        rank=RANK,
        alpha=RANK,
        targets="all",
        seed=SEED,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run_training(
            denoiser, pictures, "plain", settings, Path(folder), split=manifest, cache=False
        )
        report, _ = audit_lora(denoiser, Path(folder) / WEIGHTS, sides, AuditOptions())
    question = next(q for q in report["questions"] if q["id"] == "membership")
    return attack_rows(
        report["membership"],
        dataset=name,
        base="mini",
        exposure=round(result.exposure, 1),
        rank=RANK,
        seed=SEED,
        captions="known",
        level=question["level"] or question["claim"],
    )
