"""Does a learned mask hold anything of the data? Asked of `mini`, before any other figure about masks counts.

The same pictures with another seed must give the same ranking, another forbidden domain another one, and none
may be the ranking that the seed alone would have given. The published update is asked the same. The masks are
those of `freezeasguard`, and are kept with them. `python -m bench.mask_learns` measures the interval between two
updates of the mask alone; rows of the recorded table stay.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bench._result import record, with_recorded
from bench.guard_cases import INTERVAL, OTHER_ILLEGAL, QUICK, WORK, Learned, Sizes, World, load
from diffward.guard import FreezeMask
from diffward.guard.published import Published
from diffward.guard.settings import GuardSettings

TOP = 0.3
PLACE = 1  # whose pictures
SEEDS = (1, 2, 3)
INTERVALS = (1, 12)  # steps of the user between two updates of the mask, beside the default


def run(quick: bool = False) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            learned = Learned("mini", load("mini"), Path(folder), QUICK)
            write([*measured(learned, 2), *by_interval(learned, INTERVALS[:1])], quick=True)
    else:
        learned = Learned("mini", load("mini"), WORK, Sizes())
        write([*measured(learned, len(SEEDS)), *by_interval(learned, (INTERVAL, *INTERVALS))])


def write(rows: list[dict[str, Any]], quick: bool = False) -> None:
    if not quick:
        rows = with_recorded("mask-learns", rows, ("method",))
    record("mask-learns", rows, seeds=SEEDS, quick=quick, notes=[
        "rank_correlation: Spearman's, of the scores of all 286 tensors, mean over pairs of seeds (the same pictures)",
        "top30_overlap: shared part of the 30 % of tensors with the highest scores, mean over pairs; by chance "
        "overlap_by_chance, below overlap_95 in 95 % of cases (hypergeometric)",
        "overlap_ci95: bootstrap over tensors, the widest of the pairs",
        "data_free_overlap: with the top 30 % of what the same seed gives without any picture (random scores, so chance "
        "by construction for ours, which starts from equal logits; for the published update its own random start)",
        "other_domain_overlap, other_domain_correlation: with the mask for mosaic-style logos as forbidden domain",
        "other_people_*: with the masks for other people and other pictures of the style (freezeasguard's seeds)",
        f"an update every k steps: the user makes {Sizes.updates * INTERVAL} steps with any k; {INTERVAL} is the default and "
        "like_default the rank correlation with its scores; illegal_undone, innocent_undone: share of what fine-tuning "
        "gains that is lost when the frozen 30 % of the parameters are taken back, mean of the two seeds",
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


def by_interval(learned: Learned, intervals: tuple[int, ...]) -> list[dict[str, Any]]:
    """What the number of the user's steps between two updates changes, for as many steps."""
    place = World(PLACE, 5, "neon garments", learned.sizes, learned.work)
    rows = []
    for interval in intervals:
        found, usual = (
            {s: learned.mask(place, seed=None if s == PLACE else s, interval=k) for s in SEEDS[:2]}
            for k in (interval, INTERVAL)
        )
        undone = [_undone(mask.facts["losses"]) for mask in found.values()]
        rows.append({
            "method": f"freeze, an update every {interval} steps", **_agreement(found),
            "like_default": _mean(spearmanr(found[s].scores.numpy(), usual[s].scores.numpy())[0] for s in found),
            "illegal_undone": _mean(one["illegal"] for one in undone),
            "innocent_undone": _mean(one["innocent"] for one in undone),
        })  # fmt: skip
    return rows


def _undone(losses: dict[str, dict[str, float]]) -> dict[str, float]:
    base, tuned, masked = (losses[name] for name in ("base", "tuned", "masked"))
    return {one: (masked[one] - tuned[one]) / (base[one] - tuned[one]) for one in base}


def _row(
    again: dict[int, FreezeMask], other: FreezeMask, people: dict[int, FreezeMask], free: dict[int, torch.Tensor]
) -> dict[str, Any]:  # fmt: skip
    scores = {s: mask.scores.numpy() for s, mask in again.items()}
    foreign = [
        (people[a].scores.numpy(), people[b].scores.numpy()) for a, b in combinations(people, 2)
    ]
    return {
        **_agreement(again),
        "data_free_overlap": _mean(_overlap(scores[s], free[s].numpy()) for s in scores),
        "other_domain_overlap": _overlap(scores[PLACE], other.scores.numpy()),
        "other_domain_correlation": float(spearmanr(scores[PLACE], other.scores.numpy())[0]),
        "other_people_correlation": _mean(spearmanr(a, b)[0] for a, b in foreign) if foreign else None,
        "other_people_overlap": _mean(_overlap(a, b) for a, b in foreign) if foreign else None,
    }  # fmt: skip


def _agreement(again: dict[int, FreezeMask]) -> dict[str, Any]:
    """Of the masks that several seeds gave from the same pictures."""
    scores = {s: mask.scores.numpy() for s, mask in again.items()}
    pairs, count = list(combinations(scores, 2)), len(next(iter(scores.values())))
    ends = [_bootstrap(scores[a], scores[b]) for a, b in pairs]
    return {
        "seeds": len(scores), "tensors": count,
        "rank_correlation": _mean(spearmanr(scores[a], scores[b])[0] for a, b in pairs),
        "top30_overlap": _mean(_overlap(scores[a], scores[b]) for a, b in pairs),
        "overlap_ci95": [min(e[0] for e in ends), max(e[1] for e in ends)],
        **_chance(count),
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


if __name__ == "__main__":
    sys.exit(
        write(by_interval(Learned("mini", load("mini"), WORK, Sizes()), (INTERVAL, *INTERVALS)))
    )
