"""What the weights of one LoRA give away, each finding with its null distributions. Numbers only; words are the report's.

A p-value here is (1 + cases of a null distribution that do as well) / (1 + all cases); the largest of several counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from diffward.inversion.tokens import Tokens

if TYPE_CHECKING:
    from diffward.inversion.inverter import Inverter

SHUFFLES = 199


@dataclass(frozen=True)
class IdentityFinding:
    """How near the subject of given pictures is to what the weights say, by the floor, the simplest reader.

    closeness     cosine of both vectors about the subjects' mean
    rank          1 + strangers of the gallery that are as near
    p_gallery     by strangers; p_others by other LoRAs' readings; p_shuffled by the file's own weights, shuffled
    encoder_rank  the rank by the encoder
    spread        mean squared distance of single pictures from their mean, by what it is for pictures of one subject
    """

    closeness: float
    rank: int
    gallery: int
    encoder_rank: int
    p_gallery: float
    p_others: float
    others: int
    p_shuffled: float
    shuffles: int
    spread: float

    @property
    def p_value(self) -> float:
        return max(self.p_gallery, self.p_others, self.p_shuffled)


@dataclass(frozen=True)
class SubjectFinding:
    """Whether the weights hold a subject at all: the floor's score (about 1 if so, 0 if not), and LoRAs without one that reach it."""

    score: float
    p_value: float
    empty: int


@dataclass(frozen=True)
class SizeFinding:
    """Number of training pictures: estimate and 95 % interval; skill: share of a constant's error that is saved on held-out LoRAs."""

    pictures: float
    interval: tuple[float, float]
    skill: float


def identity_finding(
    inverter: Inverter, tokens: Tokens, features: np.ndarray, seed: int = 0
) -> IdentityFinding:
    """One LoRA (tokens of it alone) against pictures of one subject, features (n, d) by the inverter's eye."""
    wanted = inverter.standard_identity(inverter.space.of(features))[None]
    size = inverter.facts.identity
    reading = inverter.read(tokens)

    def rank(found: Tensor) -> int:
        own = inverter.closeness(found, wanted)[0, 0]
        return 1 + int((inverter.closeness(found, inverter.gallery)[0] >= own).sum())

    floor = reading.floor[:, :size]
    own = inverter.closeness(floor, wanted)[0, 0]
    mixed = inverter.floor(tokens.of([0] * SHUFFLES).shuffled(seed).cores)[:, :size]
    others, shuffled = (inverter.closeness(some, wanted)[:, 0] for some in (inverter.others, mixed))
    return IdentityFinding(
        float(own), rank(floor), len(inverter.gallery), rank(reading.identity),
        _p(inverter.closeness(floor, inverter.gallery)[0], own), _p(others, own), len(others), _p(shuffled, own),
        len(shuffled), inverter.space.spread(features),
    )  # fmt: skip


def subject_finding(inverter: Inverter, tokens: Tokens) -> SubjectFinding | None:
    """None where the inverter has seen no LoRA without a subject to compare with."""
    if not len(inverter.empty):
        return None
    score = inverter.read(tokens).floor[0, -1]
    return SubjectFinding(float(score), _p(inverter.empty, score), len(inverter.empty))


def size_finding(inverter: Inverter, tokens: Tokens) -> SizeFinding:
    told = inverter.facts.held_out["log_pictures"]
    value = float(inverter.read(tokens).log_pictures[0])
    low, high = told["quantiles"]
    return SizeFinding(
        math.exp(value),
        (max(1.0, math.exp(value + low)), math.exp(value + high)),
        1 - told["mae"] / told["constant_mae"],
    )


def nearest(
    inverter: Inverter, drawn: np.ndarray, real: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each drawn picture, features (n, d), the nearest real one, features (m, d): its row (n,) and the cosine (n,).

    In the space of identities, so that pose and background count little.
    """

    def vectors(features: np.ndarray) -> Tensor:
        return F.normalize(inverter.standard_identity(inverter.space.each(features)), dim=1)

    close = vectors(drawn) @ vectors(real).T
    best = close.max(1)
    return best.indices.numpy(), best.values.numpy()


def _p(cases: Tensor, own: Tensor) -> float:
    return (1 + int((cases >= own).sum())) / (1 + len(cases))
