"""What the weights of one LoRA give away, each finding with its null distributions. Numbers only; words are the report's.

A p-value here is (1 + cases of a null distribution that do as well) / (1 + all cases); the largest of several counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffward.inversion.tokens import Tokens

if TYPE_CHECKING:
    from diffward.inversion.inverter import Inverter

SHUFFLES = 199


@dataclass(frozen=True)
class IdentityFinding:
    """How near the subject of given pictures is to what the weights say.

    closeness   cosine of both vectors about the subjects' mean
    rank        1 + strangers of the gallery that are as near
    p_gallery   by strangers; p_others by other LoRAs' readings; p_shuffled by the file's own weights, shuffled
    floor_rank  the rank by ridge regression alone
    """

    closeness: float
    rank: int
    gallery: int
    floor_rank: int
    p_gallery: float
    p_others: float
    others: int
    p_shuffled: float
    shuffles: int

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
    reading = inverter.read(tokens)
    own = inverter.closeness(reading.identity, wanted)[0, 0]
    strangers = inverter.closeness(reading.identity, inverter.gallery)[0]
    others = inverter.closeness(inverter.others, wanted)[:, 0]
    shuffled = inverter.closeness(
        inverter.read(shuffled_tokens(tokens, SHUFFLES, seed)).identity, wanted
    )[:, 0]
    floor = reading.floor[:, : inverter.facts.identity]
    floor_own = inverter.closeness(floor, wanted)[0, 0]
    nearer = int((strangers >= own).sum())
    return IdentityFinding(
        float(own), 1 + nearer, len(strangers),
        1 + int((inverter.closeness(floor, inverter.gallery)[0] >= floor_own).sum()),
        _p(strangers, own), _p(others, own), len(others), _p(shuffled, own), len(shuffled),
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


def shuffled_tokens(tokens: Tokens, count: int, seed: int = 0) -> Tokens:
    """`count` times one LoRA, each core's entries in a random order of its own: norms and spectra stay."""
    g = torch.Generator().manual_seed(seed)
    cores = tokens.cores[0].float().flatten(1)
    order = torch.rand((count, *cores.shape), generator=g).argsort(-1)
    mixed = cores.expand(count, -1, -1).gather(-1, order).view(count, *tokens.cores.shape[1:])
    return Tokens(
        mixed,
        *(x.expand(count, *x.shape[1:]) for x in (tokens.norms, tokens.spectra, tokens.present)),
    )


def nearest(
    inverter: Inverter, drawn: np.ndarray, real: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each drawn picture, features (n, d), the nearest real one, features (m, d): its row (n,) and the cosine (n,).

    In the space of identities, so that pose and background count little.
    """

    def vectors(features: np.ndarray) -> Tensor:
        each = torch.stack([inverter.space.of(one[None]) for one in features])
        return F.normalize(inverter.standard_identity(each), dim=1)

    close = vectors(drawn) @ vectors(real).T
    best = close.max(1)
    return best.indices.numpy(), best.values.numpy()


def _p(cases: Tensor, own: Tensor) -> float:
    return (1 + int((cases >= own).sum())) / (1 + len(cases))
