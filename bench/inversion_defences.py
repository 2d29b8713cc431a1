"""Which defence keeps the identity, at which cost in utility: trainings and changes of the file, against readers that do not know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.inversion_readers import row

if TYPE_CHECKING:
    from bench.weight_inversion import Rows, Setting
    from diffward.lora import LoraWeights
    from diffward.models.features import Features

VICTIMS, PICTURES, CAPTION = 10, 12, "a portrait of {}"
STEPS = 60


@dataclass(frozen=True)
class Training:
    """A way of training: a method and what differs from plain."""

    method: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)


TRAININGS = {
    "none": Training(), "20 steps": Training(options={"steps": 20}), "rank 1": Training(options={"rank": 1, "alpha": 1.0}),
    "text side only": Training(options={"targets": "text"}), "smp": Training("smp"), "hinge": Training("hinge"),
    "dp, epsilon 1, delta 0.01": Training("dp", {"epsilon": 1.0}), "dp, epsilon 10, delta 0.01": Training("dp", {"epsilon": 10.0}),
    "dp, epsilon 100, delta 0.01": Training("dp", {"epsilon": 100.0}),
}  # fmt: skip
CHANGES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    f"weight noise, {share:g} of the spread": (
        lambda w, seed, share=share: w + share * w.std() * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
    )
    for share in (0.5, 1.0, 2.0)
} | {
    f"quantised to {bits} bits": (lambda w, seed, bits=bits: _quantised(w, bits)) for bits in (8, 4, 2)
}  # fmt: skip


def defences(setting: Setting) -> Rows:
    victims = [10**7 + i for i in range(2 if setting.quick else VICTIMS)]
    people = [_person(setting, number) for number in victims]
    files: dict[str, list[LoraWeights]] = {}
    for name, training in TRAININGS.items():
        if setting.quick and name not in ("none", "dp, epsilon 10, delta 0.01"):
            continue
        files[name] = [_train(setting, person, training, i) for i, person in enumerate(people)]
    plain = files["none"]
    for name, change in CHANGES.items():
        if setting.quick and name != "quantised to 4 bits":
            continue
        files[name] = [_changed(weights, change, i) for i, weights in enumerate(plain)]
    files["strongest component only"] = [_truncated(weights, 1) for weights in plain]
    base = [_loss(setting, person, None) for person in people]
    gains = [
        b - _loss(setting, person, w) for b, person, w in zip(base, people, plain, strict=True)
    ]
    return [_row(setting, name, made, people, victims, base, gains) for name, made in files.items()]


@dataclass(frozen=True)
class Person:
    """A victim: training pictures, others of the same person for the losses, and its label."""

    number: int
    features: Features
    others: Features
    label: tuple[int, ...]
    word: str


def _person(setting: Setting, number: int) -> Person:
    subjects, denoiser = setting.material.subjects, setting.denoiser
    word = "".join(np.random.default_rng([number, 5]).choice(list("bdfgklmnprstvz"), 6))

    def features(seed: int) -> Features:
        from diffward.models.features import Features

        pictures = subjects.pictures(number, PICTURES, [seed])
        latents = denoiser.encode(np.stack([p.pixels for p in pictures]))
        caption = CAPTION.format(word)
        return Features(
            latents, [caption] * PICTURES, [f"{i}" for i in range(PICTURES)], denoiser.condition([caption]),
            torch.zeros(PICTURES, dtype=torch.long),
        )  # fmt: skip

    return Person(number, features(1), features(4), subjects.label(number), word)


def _train(setting: Setting, person: Person, training: Training, seed: int) -> LoraWeights:
    """Private methods may compare half of the pictures with half of others of the person."""
    from diffward.finetune import METHODS, Settings, train
    from diffward.finetune.auxiliary import Auxiliary
    from diffward.finetune.settings import DP

    options = {
        "steps": 4 if setting.quick else STEPS,
        "batch": 4,
        "lr": 1e-3,
        "rank": 8,
        "alpha": 8.0,
        **training.options,
    }
    if (epsilon := options.pop("epsilon", None)) is not None:
        options["dp"] = DP(epsilon=epsilon, delta=0.01, accountant="rdp")
    half = PICTURES // 2
    auxiliary = Auxiliary(
        torch.arange(half),
        person.others.of(range(half)),
        torch.arange(half, PICTURES),
        person.others.of(range(half, PICTURES)),
    )
    method = METHODS[training.method].obj()
    result = train(
        setting.denoiser, person.features, method, Settings(seed=seed, **options),
        auxiliary=auxiliary if method.needs_auxiliary or method.needs_gauge else None,
    )  # fmt: skip
    setting.denoiser.detach()
    assert result.weights is not None
    return result.weights


def _row(
    setting: Setting, name: str, made: list[LoraWeights], people: list[Person], victims: list[int], base: list[float],
    gains: list[float],
) -> dict[str, Any]:  # fmt: skip
    from diffward.inversion.data import identity_vectors
    from diffward.inversion.judge import attribute_accuracy, retrieve
    from diffward.inversion.tokens import Tokens
    from diffward.models.mini.attributes import Person as Drawn
    from diffward.models.mini.reader import load_reader
    from diffward.models.sampling import sample

    inverter, material, denoiser = setting.inverter, setting.material, setting.denoiser
    parts = [inverter.tokens(weights) for weights in made]
    tokens = Tokens.cat(parts)
    reading = inverter.read(tokens)
    vectors = identity_vectors(material.subjects, victims, material.eye, inverter.space)
    own = inverter.standard_identity(torch.stack([vectors[v] for v in victims]))
    floor = retrieve(reading.floor[:, : inverter.facts.identity], own, inverter.gallery).figures()
    labels = torch.tensor([person.label for person in people])
    losses = [_loss(setting, person, weights) for person, weights in zip(people, made, strict=True)]
    kept = (sum(base) - sum(losses)) / sum(gains)
    reader, matches = load_reader(), []
    for person, weights in zip(people, made, strict=True):
        denoiser.attach(weights)
        drawn = sample(denoiser, [CAPTION.format(person.word)] * 4, seed=person.number)
        matches.append(float(reader.matches(drawn, Drawn(person.label)).mean()))
    denoiser.detach()
    data = _Victims(torch.stack([vectors[v] for v in victims]))
    return row(
        "encoder", reading.identity, data, inverter, defence=name, accuracy=attribute_accuracy(reading, labels),  # type: ignore[arg-type]
    ) | {
        "utility": kept, "drawn_match": float(np.mean(matches)), "floor_top1": floor["top1"],
        "floor_top10": floor["top10"], "membership_auc": _membership(setting, people, made),
    }  # fmt: skip


@dataclass(frozen=True)
class _Victims:
    identity: torch.Tensor


def _loss(setting: Setting, person: Person, weights: LoraWeights | None) -> float:
    return float(np.mean(_errors(setting, person.others, weights)))


def _errors(setting: Setting, features: Features, weights: LoraWeights | None) -> np.ndarray:
    from diffward.models.pairs import Pairs

    denoiser = setting.denoiser
    denoiser.detach()
    if weights is not None:
        denoiser.attach(weights)
    pairs = Pairs.draw(denoiser, 8, 0)
    errors = pairs.errors(denoiser, features, torch.arange(len(features))).mean(1).numpy()
    denoiser.detach()
    return np.asarray(errors)


def _membership(setting: Setting, people: list[Person], made: list[LoraWeights]) -> float:
    """AUC of the base-calibrated loss, training pictures against others of the person, mean over victims."""
    from sklearn.metrics import roc_auc_score

    values = []
    for person, weights in zip(people, made, strict=True):
        scores = [
            _errors(setting, f, None) - _errors(setting, f, weights)
            for f in (person.features, person.others)
        ]
        values.append(roc_auc_score([1] * PICTURES + [0] * PICTURES, np.concatenate(scores)))
    return float(np.mean(values))


def _changed(
    weights: LoraWeights, change: Callable[[torch.Tensor, int], torch.Tensor], seed: int
) -> LoraWeights:
    modules = {
        name: replace(module, tensors={role: change(t, seed) for role, t in module.tensors.items()})
        for name, module in weights.modules.items()
    }
    return replace(weights, modules=modules)


def _truncated(weights: LoraWeights, count: int) -> LoraWeights:
    """The strongest components of each module."""
    from diffward.lora import LoraModule, canonical_module

    modules = {}
    for name, module in weights.modules.items():
        one = canonical_module(module, most=count)
        root = one.sigma.sqrt()
        modules[name] = LoraModule.of(
            name, (one.v * root).T.contiguous(), one.u * root, float(count)
        )
    return replace(weights, modules=modules)


def _quantised(w: torch.Tensor, bits: int) -> torch.Tensor:
    """To 2^bits values, evenly spaced over the tensor's range and none of them zero."""
    largest = w.abs().max().clamp_min(1e-12)
    half = 2 ** (bits - 1)
    steps = (w / largest * (half - 0.5) - 0.5).round().clamp(-half, half - 1) + 0.5
    return steps / (half - 0.5) * largest
