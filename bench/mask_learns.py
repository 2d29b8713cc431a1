"""Does a learned mask hold anything of the data? Asked of `mini`, before any other figure about masks counts.

The same pictures with another seed must give the same ranking, another forbidden domain another one, and none
may be the ranking that the seed alone would have given. The published update is asked the same. The masks are
those of `freezeasguard`, and are kept with them.
"""

from __future__ import annotations

import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bench._result import record
from bench.guard_cases import OTHER_ILLEGAL, QUICK, WORK, Learned, Sizes, World, load
from diffward.guard import FreezeMask
from diffward.guard.published import Published
from diffward.guard.settings import GuardSettings

TOP = 0.3
PLACE = 1  # whose pictures
SEEDS = (1, 2, 3)


def run(quick: bool = False) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            rows = measured(Learned("mini", load("mini"), Path(folder), QUICK), 2)
    else:
        rows = measured(Learned("mini", load("mini"), WORK, Sizes()), len(SEEDS))
    record("mask-learns", rows, seeds=SEEDS, quick=quick, notes=[
        "rank_correlation: Spearman's, of the scores of all 286 tensors, mean over pairs of seeds (the same pictures)",
        "top30_overlap: shared part of the 30 % of tensors with the highest scores, mean over pairs; by chance "
        "overlap_by_chance, below overlap_95 in 95 % of cases (hypergeometric)",
        "overlap_ci95: bootstrap over tensors, the widest of the pairs",
        "data_free_overlap: with the top 30 % of what the same seed gives without any picture (random scores, so chance "
        "by construction for ours, which starts from equal logits; for the published update its own random start)",
        "other_domain_overlap, other_domain_correlation: with the mask for mosaic-style logos as forbidden domain",
        "other_people_*: with the masks for other people and other pictures of the style (freezeasguard's seeds)",
    ])  # fmt: skip


def measured(learned: Learned, count: int) -> list[dict[str, Any]]:
    place = World(PLACE, 5, "neon garments", learned.sizes, learned.work)
    seeds = SEEDS[:count]
    again = {s: learned.mask(place, seed=None if s == PLACE else s) for s in seeds}
    other = learned.mask(place, kind=OTHER_ILLEGAL)
    people = {
        s: learned.mask(World(s, 5, "neon garments", learned.sizes, learned.work)) for s in seeds
    }
    rows = [{"method": "freeze", **_row(again, other, people, _lots(again))}]
    published = {
        s: learned.mask(place, seed=None if s == PLACE else s, paper=True) for s in seeds[:2]
    }
    other = learned.mask(place, kind=OTHER_ILLEGAL, paper=True)
    starts = {
        s: Published(GuardSettings(seed=s), len(mask.tensors)).x for s, mask in published.items()
    }
    return [*rows, {"method": "freeze, as published", **_row(published, other, {}, starts)}]


def _row(
    again: dict[int, FreezeMask], other: FreezeMask, people: dict[int, FreezeMask], free: dict[int, torch.Tensor]
) -> dict[str, Any]:  # fmt: skip
    scores = {s: mask.scores.numpy() for s, mask in again.items()}
    pairs = list(combinations(scores, 2))
    count = len(next(iter(scores.values())))
    ends = [_bootstrap(scores[a], scores[b]) for a, b in pairs]
    foreign = [
        (people[a].scores.numpy(), people[b].scores.numpy()) for a, b in combinations(people, 2)
    ]
    return {
        "seeds": len(scores), "tensors": count,
        "rank_correlation": _mean(spearmanr(scores[a], scores[b])[0] for a, b in pairs),
        "top30_overlap": _mean(_overlap(scores[a], scores[b]) for a, b in pairs),
        "overlap_ci95": [min(e[0] for e in ends), max(e[1] for e in ends)],
        **_chance(count),
        "data_free_overlap": _mean(_overlap(scores[s], free[s].numpy()) for s in scores),
        "other_domain_overlap": _overlap(scores[PLACE], other.scores.numpy()),
        "other_domain_correlation": float(spearmanr(scores[PLACE], other.scores.numpy())[0]),
        "other_people_correlation": _mean(spearmanr(a, b)[0] for a, b in foreign) if foreign else None,
        "other_people_overlap": _mean(_overlap(a, b) for a, b in foreign) if foreign else None,
    }  # fmt: skip


def _lots(again: dict[int, FreezeMask]) -> dict[int, torch.Tensor]:
    """Random scores of the same seeds."""
    return {
        s: torch.rand(len(mask.tensors), generator=torch.Generator().manual_seed(s))
        for s, mask in again.items()
    }


def _top(scores: np.ndarray) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[: round(TOP * len(scores))].tolist())


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return len(_top(a) & _top(b)) / round(TOP * len(a))


def _bootstrap(a: np.ndarray, b: np.ndarray, resamples: int = 1000) -> tuple[float, float]:
    """Of the overlap, tensors drawn anew."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(len(a), size=len(a)) for _ in range(resamples)]
    low, high = np.percentile([_overlap(a[i], b[i]) for i in drawn], [2.5, 97.5])
    return float(low), float(high)


def _chance(count: int) -> dict[str, float]:
    from scipy.stats import hypergeom

    k = round(TOP * count)
    return {
        "overlap_by_chance": k / count,
        "overlap_95": float(hypergeom.ppf(0.95, count, k, k)) / k,
    }


def _mean(values: Any) -> float:
    known = [float(value) for value in values]
    return sum(known) / len(known)
