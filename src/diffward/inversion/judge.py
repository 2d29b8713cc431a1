"""How well weights are read: a subject among strangers, attributes, numbers of pictures and steps, with the controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffward.metrics.shares import wilson

if TYPE_CHECKING:
    from diffward.inversion.inverter import Inverter, Reading
    from diffward.inversion.learn import Material

CONTROLS = ("own", "shuffled", "other", "mean")


@dataclass(frozen=True)
class Retrieval:
    """Of each victim, how many of the gallery's strangers are nearer than the subject."""

    rank: Tensor
    gallery: int

    def figures(self) -> dict[str, Any]:
        n = len(self.rank)
        found: dict[str, Any] = {"victims": n, "gallery": self.gallery}
        for k in (1, 10):
            hits = int((self.rank < k).sum())
            found[f"top{k}"] = hits / n
            found[f"top{k}_ci95"] = list(wilson(hits, n))
        return found | {"median_rank": float(self.rank.float().median()) + 1}


def retrieve(found: Tensor, own: Tensor, gallery: Tensor) -> Retrieval:
    """Vectors that were read (n, k) against the subjects' (n, k) and the strangers' (g, k), by cosine; ties count against."""
    found, own = F.normalize(found, dim=1), F.normalize(own, dim=1)
    close = found @ F.normalize(gallery, dim=1).T
    return Retrieval((close >= (found * own).sum(1, keepdim=True)).sum(1), len(gallery))


def controlled(reading: Tensor, shuffled: Tensor, control: str, seed: int = 0) -> Tensor:
    """What stands in the place of the victims' own readings (n, k).

    own: nothing; shuffled: readings of the same weights, shuffled; other: another victim's; mean: the same for all.
    """
    if control == "own":
        return reading
    if control == "shuffled":
        return shuffled
    if control == "other":
        return reading.roll(1 + seed % max(1, len(reading) - 1), 0)
    return reading.mean(0, keepdim=True).expand(len(reading), -1)


def attribute_accuracy(reading: Reading, labels: Tensor) -> float | None:
    """Mean share of attributes that are read right, labels (n, attributes)."""
    if not reading.attributes:
        return None
    hits = [found.argmax(1) == labels[:, i] for i, found in enumerate(reading.attributes.values())]
    return float(torch.stack(hits).float().mean())


def chance_accuracy(labels: Tensor) -> float | None:
    """Of always naming each attribute's most frequent value."""
    if not labels.shape[1]:
        return None
    return float(
        np.mean(
            [np.bincount(labels[:, i].numpy()).max() / len(labels) for i in range(labels.shape[1])]
        )
    )


def floor_identity(reading: Reading, size: int) -> Tensor:
    """The identity vectors that the floor reads."""
    return reading.floor[:, :size]


@torch.no_grad()
def held_out(inverter: Inverter, material: Material) -> dict[str, Any]:
    """Figures on the test split's last saves, the step not told; shuffled weights beside, which must be at chance."""
    data = material.test.last()
    reading = inverter.read(data.tokens)
    own = inverter.standard_identity(data.identity)
    found: dict[str, Any] = {}
    shuffled = inverter.read(data.tokens.shuffled())
    for name, vectors in (
        ("encoder", reading.identity), ("floor", floor_identity(reading, inverter.facts.identity)),
        ("shuffled", shuffled.identity),
    ):  # fmt: skip
        found[name] = retrieve(vectors, own, inverter.gallery).figures()
    errors = {
        name: (truth, told) for name, truth, told in (
            ("log_steps", data.log_steps, reading.log_steps), ("log_pictures", data.log_pictures, reading.log_pictures),
        )
    }  # fmt: skip
    for name, (truth, told) in errors.items():
        constant = float(getattr(material.train.last(), name).median())
        found[name] = {
            "victims": len(data),
            "mae": float((told - truth).abs().mean()), "constant_mae": float((truth - constant).abs().mean()),
            "quantiles": _quantiles(material, inverter, name),
        }  # fmt: skip
    found["attribute_accuracy"] = attribute_accuracy(reading, data.labels)
    found["attribute_chance"] = chance_accuracy(data.labels)
    return found


def _quantiles(material: Material, inverter: Inverter, name: str) -> list[float]:
    """Of truth less reading, on the validation LoRAs: what to add for a 95 % interval."""
    data = material.valid.last()
    rest = getattr(data, name) - getattr(inverter.read(data.tokens), name)
    return [float(rest.quantile(q)) for q in (0.025, 0.975)]
