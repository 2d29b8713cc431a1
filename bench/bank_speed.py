"""The score bank, batched and cached, and picture by picture with neither.

The other way does for each picture what its definition says: load, encode, embed the caption, then
for each pair one pass of the UNet with the LoRA on and one with it off, switched through PEFT.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from bench._result import record
from bench._support import base_name, clocked, draw_folder, interleaved, mini_base

if TYPE_CHECKING:
    from diffward.data import Pictures
    from diffward.lora import LoraWeights
    from diffward.membership.bank import Bank, Pairs
    from diffward.models.denoiser import Denoiser

SEED = 0
RANK = 8
SD15 = "sd15 architecture"
SD15_RESOLUTION = 128


def run(quick: bool = False) -> None:
    with mini_base() as base:
        rows = [compare(base, 4, 8, 2) if quick else compare(base, 64, 16, 3)]
        rows.append(suite(base, 4, 1) if quick else suite(base, 16, 2))
    if not quick:
        rows.append(compare(SD15, 8, 4, 1))
    record("bank-speed", rows, seeds=[SEED], quick=quick, notes=[
        "one_by_one: a picture and a pair at a time, nothing kept; cold: ours with an empty cache on disk; "
        "the two in turns in one process, medians; ratio: one_by_one over cold",
        "again: ours a second time; other_lora: another LoRA on the same pictures, whose base errors are there",
        "difference: largest relative difference between the errors of the two ways",
        "attacks: a suite from one bank against each attack for itself, one picture and one pair a pass; encoding "
        "pictures and captions is in both",
        "sd15 architecture: random weights, full size, fp32, 128 pixels",
    ])  # fmt: skip


def compare(base: str, count: int, pairs_count: int, rounds: int) -> dict[str, Any]:
    from diffward.data import load_pictures
    from diffward.membership.bank import Pairs

    denoiser = _denoiser(base)
    first, second = _random_lora(denoiser, 1), _random_lora(denoiser, 2)
    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder), count, [SEED, 8], size=denoiser.resolution)
        pictures = load_pictures(folder)
        pairs = Pairs.draw(denoiser, pairs_count, SEED)
        banks: dict[str, np.ndarray] = {}
        again_s, other_s = [], []

        def cold() -> float:
            with _fresh_cache():
                seconds = clocked(
                    lambda: banks.update(ours=_ours(denoiser, pictures, pairs, first, "1"))
                )
                again_s.append(clocked(lambda: _ours(denoiser, pictures, pairs, first, "1")))
                other_s.append(clocked(lambda: _ours(denoiser, pictures, pairs, second, "2")))
            return seconds

        def one_by_one() -> float:
            return clocked(
                lambda: banks.update(theirs=_one_by_one(denoiser, pictures, pairs, first))
            )

        _ours(denoiser, pictures.at(range(2)), pairs, first, None)  # kernels warm
        cold_s, single_s = interleaved(rounds, cold, one_by_one)
    mine, theirs = banks["ours"], banks["theirs"]
    return {
        "base": base if base == SD15 else base_name(base),
        "pictures": count,
        "pairs": pairs_count,
        "cold_s": median(cold_s),
        "one_by_one_s": median(single_s),
        "ratio": median(b / a for a, b in zip(cold_s, single_s, strict=True)),
        "again_s": median(again_s),
        "other_lora_s": median(other_s),
        "difference": float((np.abs(mine - theirs) / theirs).max()),
    }


SUITE = ("loss", "loss_mc", "calibrated", "clid", "clid_vec", "pfami", "quantile")


def suite(base: str, count: int, rounds: int) -> dict[str, Any]:
    """The attacks that live on errors, from one bank and each for itself, a picture and a pair at a time."""
    from diffward.data import load_pictures
    from diffward.membership.bank import Pairs, build_bank
    from diffward.membership.evaluate import chosen_attacks
    from diffward.models.features import encode_pictures

    denoiser = _denoiser(base)
    denoiser.attach(_random_lora(denoiser, 1))
    entries = chosen_attacks(",".join(SUITE))
    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder), count, [SEED, 9], size=denoiser.resolution)
        pictures = load_pictures(folder)
        pairs = Pairs.draw(denoiser, 16, SEED)
        member = np.arange(count) % 2 == 0
        scores: dict[str, list[np.ndarray]] = {"one": [], "own": []}
        evaluations: dict[str, int] = {}

        def bank_of(chosen: Pictures, batch: int | None) -> Bank:
            features = encode_pictures(denoiser, chosen, cache=False)
            return build_bank(denoiser, features, chosen, member[: len(chosen)], pairs, batch=batch)

        def one_bank() -> None:
            before = denoiser.evaluations
            bank = bank_of(pictures, None)
            scores["one"] = [entry.obj(bank) for entry in entries]
            evaluations["one"] = denoiser.evaluations - before

        def each_alone() -> None:
            before = denoiser.evaluations
            scores["own"] = []
            for entry in entries:
                # The robust scale of CLiD wants all pictures: a bank of all, but asked one by one.
                bank = bank_of(pictures, 1)
                scores["own"].append(entry.obj(bank))
            evaluations["own"] = denoiser.evaluations - before

        one_s, own_s = interleaved(rounds, lambda: clocked(one_bank), lambda: clocked(each_alone))
    for mine, theirs in zip(scores["one"], scores["own"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-4)
    return {
        "base": base_name(base),
        "attacks": ", ".join(SUITE),
        "pictures": count,
        "pairs": 16,
        "suite_s": median(one_s),
        "one_by_one_s": median(own_s),
        "ratio": median(b / a for a, b in zip(one_s, own_s, strict=True)),
        "evaluations": evaluations["one"] // count,
        "evaluations_one_by_one": evaluations["own"] // count,
        "evaluation_ratio": evaluations["one"] / evaluations["own"],
    }


def _ours(
    denoiser: Denoiser, pictures: Pictures, pairs: Pairs, weights: LoraWeights, name: str | None
) -> np.ndarray:
    """Errors (2, N, K) as an audit gets them; with a name they are kept in the cache."""
    from diffward.membership.bank import OFF, ON, build_bank
    from diffward.models.features import encode_pictures

    denoiser.attach(weights)
    features = encode_pictures(denoiser, pictures, cache=name is not None)
    member = np.arange(len(pictures)) % 2 == 0
    bank = build_bank(denoiser, features, pictures, member, pairs, adapter_id=name)
    errors = np.stack([bank.of("errors", ON), bank.of("errors", OFF)])
    denoiser.detach()
    return errors


def _one_by_one(
    denoiser: Denoiser, pictures: Pictures, pairs: Pairs, weights: LoraWeights
) -> np.ndarray:
    """Errors (2, N, K), adapter on and off."""
    import torch

    from diffward.models.adapters import ATTENTION

    adapter = denoiser.inject(RANK, RANK, ATTENTION, text_encoder=False)
    adapter.load(weights)
    unet, schedule = denoiser.unet, denoiser.schedule
    errors = np.empty((2, len(pictures), len(pairs)))
    with torch.no_grad():
        for n, picture in enumerate(pictures):
            latents = denoiser.encode(picture.load(denoiser.resolution)[None])
            text = denoiser.condition([picture.caption])
            for k in range(len(pairs)):
                t, eps = pairs.t[k : k + 1], pairs.eps[k : k + 1]
                noisy = schedule.add_noise(latents, eps, t)
                for row, on in enumerate((True, False)):
                    adapter.enable(on)
                    prediction = unet(noisy, t, text).sample
                    errors[row, n, k] = ((prediction - eps) ** 2).mean().item()
    denoiser.detach()
    return errors


def _random_lora(denoiser: Denoiser, seed: int) -> LoraWeights:
    """A LoRA whose both factors are drawn, so that on and off differ."""
    import torch

    from diffward.models.adapters import ATTENTION

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = denoiser.inject(RANK, RANK, ATTENTION, text_encoder=False)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(std=0.02)
    weights = adapter.weights()
    denoiser.detach()
    return weights


def _denoiser(base: str) -> Denoiser:
    from diffward.models.denoiser import Denoiser
    from diffward.models.load import load_base

    if base == SD15:
        from bench.make_sd15 import new_pipeline

        return Denoiser(new_pipeline(seed=SEED), SD15, resolution=SD15_RESOLUTION)
    return load_base(base, device="cpu")


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    before = os.environ.get("DIFFWARD_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIFFWARD_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["DIFFWARD_CACHE"]
            if before is not None:
                os.environ["DIFFWARD_CACHE"] = before
