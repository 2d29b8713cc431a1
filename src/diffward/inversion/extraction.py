"""Guided extraction: drawing pictures that a LoRA was trained on, and finding copies among what is drawn.

After FineXtract (Wu et al. 2025, arXiv 2410.03039): fine-tuning moved the model from the base's distribution towards
that of the training pictures, so extrapolating from the base through the fine-tuned model goes on that way. Copies
come again and again, so they show as cliques of the graph of similar pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.models.sampling import denoise

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.eyes import Eye

_STEP = 0.05  # of the threshold
_BUDGET = 5000  # branches in the search of a clique; then the largest found so far counts


@dataclass(frozen=True)
class Extracted:
    """What was drawn, and what came again and again.

    Attributes:
        pixels: uint8 (count, H, W, 3).
        features: an eye's, (count, d).
        clusters: rows of `pixels`, each in one cluster, the largest cluster first.
        representatives: of the largest clusters the row nearest the mean of each.
        threshold: cosine similarity that any two of a cluster reach.
    """

    pixels: np.ndarray
    features: np.ndarray
    clusters: list[list[int]]
    representatives: list[int]
    threshold: float


def extrapolate(
    denoiser: Denoiser,
    conditioning: Tensor,
    generators: Sequence[torch.Generator],
    *,
    weight: float = 3.0,
    steps: int = 20,
    reference: Tensor | None = None,
) -> Tensor:
    """Latents (n, C, h, w) drawn with eps_base + weight (eps_lora - eps_base), in one batch.

    Args:
        denoiser: with an adapter attached.
        conditioning: (n, L, D), of the model with the LoRA on.
        generators: one a picture, on the CPU.
        weight: 0 is the base, 1 the LoRA's model, more goes on in the same direction.
        reference: conditioning (1 or n, L, D) of the base, as that of the empty caption; the same as the LoRA's
            by default. The paper has both, the first as a model that is guided by the caption too. Where the LoRA
            adapts the text encoder, the base's is to be given.

    Raises:
        RuntimeError: no adapter is attached.
    """
    other = conditioning if reference is None else reference.expand_as(conditioning)

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        # What is multiplied with zero is not computed.
        with denoiser.adapter(False):
            base = denoiser.predict(noisy, t, other) if weight != 1 else torch.zeros_like(noisy)
        with denoiser.adapter(True):
            tuned = denoiser.predict(noisy, t, conditioning) if weight != 0 else base
        return base + weight * (tuned - base)

    return denoise(denoiser, predict, generators, steps=steps)


@torch.no_grad()
def draw(
    denoiser: Denoiser,
    conditioning: Tensor,
    *,
    count: int = 64,
    weight: float = 3.0,
    steps: int = 20,
    seed: int = 0,
    reference: Tensor | None = None,
) -> np.ndarray:
    """Pictures uint8 (count, H, W, 3) by `extrapolate`.

    Args:
        denoiser: with the suspect's adapter attached.
        conditioning, reference: (n, L, D), given to the pictures in turn; the reference may be one for all.

    Raises:
        InputError: `count` is less than 1.
        RuntimeError: no adapter is attached.
    """
    if count < 1:
        raise InputError(f"{count} pictures to draw: must be at least 1")
    size, parts = max(1, denoiser.unet_batch // 2), []
    for start in range(0, count, size):
        rows = range(start, min(count, start + size))

        def turn(texts: Tensor, rows: range = rows) -> Tensor:
            return texts[[i % len(texts) for i in rows]]

        latents = extrapolate(
            denoiser, turn(conditioning), [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in rows],
            weight=weight, steps=steps, reference=None if reference is None else turn(reference),
        )  # fmt: skip
        parts.append(denoiser.decode(latents))
    return np.concatenate(parts)


def extract(
    denoiser: Denoiser,
    conditioning: Tensor,
    eye: Eye,
    *,
    count: int = 64,
    weight: float = 3.0,
    steps: int = 20,
    seed: int = 0,
    pictures: int = 4,
    reference: Tensor | None = None,
    centre: np.ndarray | None = None,
) -> Extracted:
    """Draw `count` pictures and cluster them.

    Args:
        denoiser, conditioning, weight, steps, seed, reference: see `draw`.
        pictures: how many training pictures are looked for: so many clusters at least, and so many representatives.
        centre: mean feature (d,) of pictures of the kind; of those drawn by default.

    Raises:
        InputError: `count` or `pictures` is less than 1.
        RuntimeError: no adapter is attached.
    """
    if count < 1 or pictures < 1:
        raise InputError(f"{count} to draw, {pictures} to find: both must be at least 1")
    pixels = draw(
        denoiser, conditioning, count=count, weight=weight, steps=steps, seed=seed, reference=reference
    )  # fmt: skip
    features = eye.features(pixels)
    unit = _unit(features, features.mean(0) if centre is None else centre)
    clusters, threshold = cluster(unit @ unit.T, pictures)
    return Extracted(
        pixels, features, clusters, [_middle(unit, c) for c in clusters[:pictures]], threshold
    )


def cluster(similarity: np.ndarray, wanted: int) -> tuple[list[list[int]], float]:
    """Cliques of similar pictures: the largest is taken out of the graph, then the largest of what is left, and so on.

    The paper raises the threshold until there are `wanted` cliques, which in a loose graph there are at once, across
    everything; here it is the one whose cliques, at least `wanted`, are told apart best (mean silhouette).

    Args:
        similarity: symmetric, (n, n).

    Returns:
        The cliques, which cover all n, largest first; and the threshold, inf where each picture is alone.
    """
    from sklearn.metrics import silhouette_score

    count = len(similarity)
    best, found, at = -np.inf, [[i] for i in range(count)], np.inf
    off = similarity[~np.eye(count, dtype=bool)]
    away = np.maximum(1 - similarity, 0)
    np.fill_diagonal(away, 0)
    # Below the median the graph is dense: slow to search, and nothing to find.
    dense = off[off >= np.median(off)] if count > 1 else off
    for threshold in np.unique(np.floor(dense / _STEP)) * _STEP:
        own = _cliques(similarity >= threshold)
        if not max(wanted, 2) <= len(own) < count:
            continue
        labels = np.empty(count, dtype=int)
        for number, clique in enumerate(own):
            labels[clique] = number
        value = float(silhouette_score(away, labels, metric="precomputed"))
        if value > best:
            best, found, at = value, own, float(threshold)
    return found, at


def copy_scores(
    drawn_features: np.ndarray, real_features: np.ndarray, centre: np.ndarray | None = None
) -> np.ndarray:
    """How near anything drawn comes to each real picture, (m,): the largest cosine similarity of centred features.

    Args:
        drawn_features: (n, d), at least one.
        real_features: (m, d) by the same eye.
        centre: mean feature (d,) of other pictures of the kind, so that it does not depend on which are judged; the
            mean of the drawn ones by default.
    """
    centre = drawn_features.mean(0) if centre is None else centre
    return np.asarray((_unit(real_features, centre) @ _unit(drawn_features, centre).T).max(1))


def _unit(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    away = np.asarray(features, np.float64) - centre
    return np.asarray(away / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-12))


def _middle(unit: np.ndarray, rows: list[int]) -> int:
    own = unit[rows]
    return rows[int(np.linalg.norm(own - own.mean(0), axis=1).argmin())]


def _cliques(adjacent: np.ndarray) -> list[list[int]]:
    """Sorted nodes of each clique, the largest first; each node is in one. Sets of nodes are the bits of integers."""
    rows = [
        sum(1 << int(j) for j in np.flatnonzero(row) if j != i) for i, row in enumerate(adjacent)
    ]
    left, found = (1 << len(rows)) - 1, []
    while left:
        found.append(_largest_clique(rows, left))
        left &= ~sum(1 << node for node in found[-1])
    return found


def _largest_clique(rows: list[int], among: int) -> list[int]:
    """Branch and bound with greedy colouring (after Tomita and Seki 2003)."""
    best: list[int] = []
    spent = 0

    def grow(clique: list[int], candidates: int) -> None:
        nonlocal best, spent
        spent += 1
        for node, bound in reversed(_coloured(rows, candidates)):
            if len(clique) + bound <= len(best) or (best and spent > _BUDGET):
                return
            if rest := candidates & rows[node]:
                grow([*clique, node], rest)
            elif len(clique) >= len(best):
                best = [*clique, node]
            candidates &= ~(1 << node)

    grow([], among)
    return sorted(best)


def _coloured(rows: Sequence[int], nodes: int) -> list[tuple[int, int]]:
    """Nodes in order of colour, with the number of colours up to there: no clique among them is larger."""
    order, colour = [], 0
    while nodes:
        colour += 1
        free = nodes
        while free:
            node = (free & -free).bit_length() - 1
            order.append((node, colour))
            nodes &= ~(1 << node)
            free &= ~(1 << node) & ~rows[node]
    return order
