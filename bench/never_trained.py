"""A LoRA that was never trained (B = 0): how often does an audit find something in it?

It changes nothing, so an audit of it is one of the base, whatever the split. Answers are computed once
and judged under many random splits, by the whole standard suite and the rules of the report.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench._result import record
from bench._support import draw_folder

SEED = 0


def run(quick: bool = False) -> None:
    sizes = ((12, 10),) if quick else ((24, 100),)
    rows = [audits(side, runs) for side, runs in sizes]
    record("never-trained", rows, seeds=[SEED], quick=quick, notes=[
        "splits: random halves of the same portraits, no blind control; refused: a base-model control was off chance",
        "none_shown: share of the splits in which the report says so; 0.95 asked",
    ])  # fmt: skip


def audits(side: int, runs: int) -> dict[str, Any]:
    from dataclasses import replace

    import torch

    from diffward.data import load_pictures
    from diffward.membership.bank import Pairs, build_bank
    from diffward.membership.evaluate import run_attacks
    from diffward.models.features import encode_pictures
    from diffward.models.load import load_base
    from diffward.report.verdict import membership_question

    denoiser = load_base("mini", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder), 2 * side, [SEED, 12])
        pictures = load_pictures(folder)
        features = encode_pictures(denoiser, pictures, cache=False)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            weights = denoiser.inject(8, 8.0, ["to_q", "to_v"], text_encoder=False).weights()
        denoiser.attach(weights)
        member = np.arange(2 * side) < side
        bank = build_bank(
            denoiser, features, pictures, member, Pairs.draw(denoiser, 16), weights=weights
        )
        told: dict[str, int] = {}
        for number in range(runs):
            order = np.random.default_rng([SEED, 13, number]).permutation(member)
            found = run_attacks(replace(bank, is_member=order, seed=number), None, seed=number)
            question = membership_question(_membership(found))
            word = question["level"] or question["claim"]
            told[word] = told.get(word, 0) + 1
    return {
        "pictures_a_side": side,
        "attacks": len(found.figures),
        "splits": runs,
        "none_shown": told.pop("none_shown", 0) / runs,
        "refused": told.pop("refused", 0) / runs,
        "levels": ", ".join(f"{k} {v}" for k, v in told.items()) or "none",
    }


def _membership(found: Any) -> Any:
    return {
        "attacks": found.figures, "best": "", "per_image": None, "skipped": found.skipped, "captions": "known",
        "evaluations_per_image": {"made": found.made, "one_by_one": found.alone}, "exposure": None,
        "dataset_inference": None, "epsilon": None,
    }  # fmt: skip
