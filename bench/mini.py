"""What `mini` can do: the figures of docs/mini.md."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench._result import record
from diffward.data import load_pictures
from diffward.finetune import Settings, train
from diffward.finetune.plain import Plain
from diffward.membership.bank import OFF, Pairs, build_bank
from diffward.membership.statistics import auc, auc_interval
from diffward.models.features import encode_pictures
from diffward.models.load import load_base
from diffward.models.mini import world
from diffward.models.mini.attributes import ATTRIBUTES, DOMAINS, Person, caption, random_values
from diffward.models.mini.diffusion import training_picture
from diffward.models.mini.reader import labels_of, load_reader
from diffward.models.sampling import sample

SEED = 90_001  # fresh: the build uses (0, 1 … 6)
LORA = Settings(steps=450, batch=8, lr=2e-3, rank=8, alpha=8)


def run(quick: bool = False) -> None:
    rows = [
        reader_accuracy(200 if quick else 4000),
        named_attributes(32 if quick else 500),
        membership(40 if quick else 500),
        *(new_person(s, 60 if quick else LORA.steps) for s in range(1 if quick else 5)),
        *speed(),
    ]
    record("mini", rows, seeds=[SEED], quick=quick, notes=[
        "reader: attributes of fresh pictures of the world read right, over all attributes of their domain",
        "named: attributes named in the prompt and read in the sampled picture, 20 steps, guidance 5",
        "new person: LoRA on 16 pictures, then 32 pictures of 'a portrait of sks'; matches = at most 1 of 8 "
        "identity attributes differs; exact = none differs",
    ])  # fmt: skip


def reader_accuracy(n: int) -> dict[str, Any]:
    drawings = [world.sample([SEED, 1, i]) for i in range(n)]
    seen = load_reader().read(np.stack([d.pixels for d in drawings]))
    labels = {k: v.numpy() for k, v in labels_of(drawings).items()}
    right = {k: float((seen[k] == labels[k])[labels[k] >= 0].mean()) for k in ATTRIBUTES}
    hits = sum(int(((seen[k] == labels[k]) & (labels[k] >= 0)).sum()) for k in ATTRIBUTES)
    worst = min(right, key=right.__getitem__)
    total = sum(int((labels[k] >= 0).sum()) for k in ATTRIBUTES)
    return {
        "what": "reader accuracy",
        "value": hits / total,
        "n": n,
        "worst": f"{worst} {right[worst]:.4f}",
    }


def named_attributes(n: int) -> dict[str, Any]:
    rng = np.random.default_rng([SEED, 2])
    wanted, prompts = [], []
    for i in range(n):
        domain = ["portrait", "portrait", "portrait", "logo", "garment"][i % 5]
        # Prompts name every attribute, or a part; only what is named counts.
        attributes = random_values(DOMAINS[domain], rng)
        named = {k: v for k, v in attributes.items() if rng.random() < 0.75}
        prompts.append(caption(domain, named, rng, mention=1.0))
        wanted.append({"domain": list(DOMAINS).index(domain), **named})
    drawn = sample(load_base("mini", device="cpu"), prompts, seed=SEED)
    found: dict[str, list[bool]] = {}
    for row in load_reader().hits(drawn, wanted):
        for k, hit in row.items():
            found.setdefault(k, []).append(hit)
    rates = {k: float(np.mean(v)) for k, v in found.items()}
    found.pop("domain")
    value = float(np.mean([hit for hits in found.values() for hit in hits]))
    worst = ", ".join(f"{k} {rates[k]:.2f}" for k in sorted(rates, key=rates.__getitem__)[:4])
    return {"what": "named attributes right", "value": value, "n": n, "worst": worst}


def membership(n: int) -> dict[str, Any]:
    drawings = [training_picture(0, 37 * i) for i in range(n)] + [
        world.sample([SEED, 3, i]) for i in range(n)
    ]
    with tempfile.TemporaryDirectory() as folder:
        world.save_folder(drawings, Path(folder))
        pictures = load_pictures(folder)
        denoiser = load_base("mini", device="cpu")
        features = encode_pictures(denoiser, pictures, cache=False)
        denoiser.inject(1, 1, ["to_q"], text_encoder=False)  # B = 0: the bank wants an adapter
        pairs = Pairs.draw(denoiser, 16)
        bank = build_bank(denoiser, features, pictures, np.arange(2 * n) < n, pairs)
        scores = -bank.of("errors", OFF).mean(axis=1)
    members, fresh = scores[:n], scores[n:]
    low, high = auc_interval(members, fresh)
    return {
        "what": "base membership AUC",
        "value": auc(members, fresh),
        "n": 2 * n,
        "ci95": [low, high],
    }


def new_person(number: int, steps: int) -> dict[str, Any]:
    person = Person.random(np.random.default_rng([SEED, 4, number]))
    drawings = world.portraits(person, 16, [SEED, 5, number], name="sks")
    reader, denoiser = load_reader(), load_base("mini", device="cpu")
    prompts = ["a portrait of sks"] * 32
    before = sample(denoiser, prompts, seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        world.save_folder(drawings, Path(folder))
        features = encode_pictures(denoiser, load_pictures(folder), cache=False)
    began = time.monotonic()
    train(denoiser, features, Plain(), Settings(**{**vars(LORA), "steps": steps, "seed": number}))
    seconds = time.monotonic() - began
    after = sample(denoiser, prompts, seed=SEED + 1)
    exact = np.ones(len(prompts), dtype=bool)
    for name, value in person.attributes().items():
        exact &= reader.read(after)[name] == value
    return {
        "what": f"new person {number}", "value": float(reader.matches(after, person).mean()), "n": len(prompts),
        "before": float(reader.matches(before, person).mean()), "exact": float(exact.mean()), "seconds": seconds,
    }  # fmt: skip


def speed() -> list[dict[str, Any]]:
    denoiser = load_base("mini", device="cpu")
    latents = torch.randn(16, *denoiser.latent_shape)
    from diffward.models.features import Features, encode_captions

    embeddings, index = encode_captions(denoiser, ["a portrait of sks"] * 16, cache=False)
    features = Features(latents, ["a portrait of sks"] * 16, ["x"] * 16, embeddings, index)
    train(denoiser, features, Plain(), Settings(steps=5))
    began = time.monotonic()
    train(denoiser, features, Plain(), Settings(steps=40))
    step = (time.monotonic() - began) / 40
    denoiser.detach()
    began = time.monotonic()
    sample(denoiser, ["a portrait of a person"] * 16)
    return [
        {"what": "LoRA step, rank 8, batch 8 (s)", "value": step, "n": 40},
        {"what": "sampling 16 pictures, 20 steps (s)", "value": time.monotonic() - began, "n": 16},
    ]
