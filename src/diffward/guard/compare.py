"""From drawn pictures to figures: each row, and guards against one another over all seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.errors import InputError
from diffward.metrics.fid import fid
from diffward.metrics.kid import LEAST, kid
from diffward.metrics.paired import kid_difference
from diffward.metrics.shares import (
    Interval,
    contrast_over_runs,
    mean_over_runs,
    ratio_over_runs,
    share_over_runs,
    student,
    wilson,
)
from diffward.models.eyes import gallery_match

if TYPE_CHECKING:
    from diffward.guard.attackers import Effort
    from diffward.guard.cells import Cell, Outcome
    from diffward.guard.evaluate import Side
    from diffward.metrics import Estimate
    from diffward.models.eyes import Eye

NONE, RANDOM, NOBODY = "none", "random", "nobody"


@dataclass(frozen=True)
class Looked:
    """A model's pictures as seen: features (n, d), matches bool (n,), agreement (n,); losses (m,) of real ones.

    Attributes:
        real: features of the domain's held-out pictures.
        subjects: of each drawn picture, "" for none.
    """

    features: np.ndarray
    real: np.ndarray
    subjects: list[str]
    matches: np.ndarray | None
    agreement: np.ndarray | None
    losses: np.ndarray
    effort: Effort
    shape: tuple[int, ...]

    @cached_property
    def kid(self) -> Estimate | None:
        if min(len(self.features), len(self.real)) < LEAST:
            return None
        found: Estimate = kid(self.features, self.real)
        return found

    @cached_property
    def fid(self) -> float | None:
        """None where there are no more pictures than features."""
        if min(len(self.features), len(self.real)) <= self.features.shape[1]:
            return None
        return float(fid(self.features, self.real))


class Judge:
    """Looks at the pictures of one domain."""

    def __init__(self, side: Side, wanted: Sequence[tuple[str, str]], eye: Eye) -> None:
        self.side, self.eye = side, eye
        self.subjects, self.prompts = [s for s, _ in wanted], [p for _, p in wanted]
        self.real = eye.features(side.real)
        known = side.galleries if side.galleries and side.match is None else {}
        self.galleries = {name: eye.features(pixels) for name, pixels in known.items()}
        for subject in dict.fromkeys(self.subjects) if known else ():
            gallery_match(
                self.real[:1], subject, self.galleries
            )  # complains before anything is trained

    def look(self, outcome: Outcome) -> Looked:
        features = self.eye.features(outcome.pixels)
        agreement = None
        if self.side.agreement:
            agreement = np.asarray(
                self.side.agreement(outcome.pixels, self.prompts), dtype=np.float64
            )
            _check_each("agreement", agreement, outcome.pixels)
        return Looked(
            features, self.real, self.subjects, self._matches(outcome.pixels, features), agreement, outcome.losses,
            outcome.effort, outcome.pixels.shape,
        )  # fmt: skip

    def _matches(self, pixels: np.ndarray, features: np.ndarray) -> np.ndarray | None:
        if self.side.match is None and not self.galleries:
            return None
        found = np.zeros(len(pixels), dtype=bool)
        for subject in dict.fromkeys(self.subjects):
            rows = [i for i, own in enumerate(self.subjects) if own == subject]
            if self.side.match:
                seen = np.asarray(self.side.match(pixels[rows], subject), dtype=bool)
            else:
                seen = gallery_match(features[rows], subject, self.galleries)
            _check_each("match", seen, rows)
            found[rows] = seen
        return found


class Table:
    """All rows, in the order of the plan."""

    def __init__(self, found: Sequence[tuple[Cell, Looked]], resamples: int) -> None:
        self.found, self.resamples = found, resamples
        self._of = {(c.guard.name, c.attacker, c.domain, c.seed): seen for c, seen in found}

    def rows(self) -> list[dict[str, Any]]:
        """A dict a guard, attacker, domain and seed."""
        return [self._row(cell, seen) for cell, seen in self.found]

    def summary(self) -> list[dict[str, Any]]:
        """A dict a guard, attacker and domain, over the seeds."""
        names = dict.fromkeys((c.guard.name, c.attacker, c.domain) for c, _ in self.found)
        return [self._over_seeds(*name) for name in names]

    # --- a row -----------------------------------------------------------------------------------

    @cached_property
    def _first(self) -> dict[str, str]:
        """By cell: the row that computed it."""
        first: dict[str, str] = {}
        for cell, _ in self.found:
            first.setdefault(cell.key, f"{cell.guard.name}/{cell.attacker}")
        return first

    def _row(self, cell: Cell, seen: Looked) -> dict[str, Any]:
        own = f"{cell.guard.name}/{cell.attacker}"
        base = self._of[NONE, NOBODY, cell.domain, cell.seed]
        plain = self._of.get((NONE, cell.attacker, cell.domain, cell.seed))
        return {
            "guard": cell.guard.name, "attacker": cell.attacker, "domain": cell.domain, "seed": cell.seed,
            "same_as": None if self._first[cell.key] == own else self._first[cell.key],
            "cell": cell.key, "shape": list(seen.shape), "pictures": len(seen.features),
            "identity_match": _share(seen), "kid": _estimate(seen.kid), "fid": seen.fid,
            "caption_agreement": None if seen.agreement is None else float(seen.agreement.mean()),
            "held_out_loss": float(seen.losses.mean()),
            "gain_kept": _gain(base, plain, seen),
            **{f"attack_{k}": v for k, v in asdict(seen.effort).items()},
            "memory_ratio": None if plain is None else seen.effort.bytes / plain.effort.bytes,
            "time_ratio": None if plain is None else _ratio(seen.effort.step_seconds, plain.effort.step_seconds),
        }  # fmt: skip

    # --- over seeds ------------------------------------------------------------------------------

    def _over_seeds(self, guard: str, attacker: str, domain: str) -> dict[str, Any]:
        own = [
            (c, s)
            for c, s in self.found
            if (c.guard.name, c.attacker, c.domain) == (guard, attacker, domain)
        ]
        seeds, seen = [c.seed for c, _ in own], [s for _, s in own]
        rows = [self._row(*pair) for pair in own]
        plain = [self._of.get((NONE, attacker, domain, seed)) for seed in seeds]
        lots = [self._of.get((RANDOM, attacker, domain, seed)) for seed in seeds]
        told: dict[str, Any] = {
            "guard": guard, "attacker": attacker, "domain": domain, "seeds": seeds,
            "same_as": rows[0]["same_as"] if len({row["same_as"] for row in rows}) == 1 else None,
            "identity_match": self._figure(share_over_runs, [s.matches for s in seen]),
            "vs_none": self._contrast((1, -1), seen, plain) if guard != NONE else None,
            "vs_random": self._contrast((1, -1), seen, lots) if guard not in (NONE, RANDOM) else None,
            "beyond_twice_random": None, "drop_ratio": None,
            "kid": _mean_kid([s.kid for s in seen]),
            "kid_vs_none": self._kid_difference(seen, plain) if guard != NONE else None,
            "fid": _mean([row["fid"] for row in rows]),
            "caption_agreement": self._figure(mean_over_runs, [s.agreement for s in seen]),
            "held_out_loss": float(np.mean([row["held_out_loss"] for row in rows])),
            "gain_kept": self._gain_kept(domain, seeds, seen, plain),
        }  # fmt: skip
        if told["vs_random"] is not None and told["vs_none"] is not None:
            told["beyond_twice_random"] = self._contrast((2, -1, -1), lots, seen, plain)
            of_random = told["vs_none"]["value"] - told["vs_random"]["value"]
            told["drop_ratio"] = told["vs_none"]["value"] / of_random if of_random < 0 else None
        for name in (
            "attack_trained",
            "attack_bytes",
            "attack_step_seconds",
            "memory_ratio",
            "time_ratio",
        ):
            told[name] = _mean([row[name] for row in rows])
        return told

    def _figure(
        self, function: Callable[..., tuple[float, Interval]], values: Sequence[np.ndarray | None]
    ) -> dict[str, Any] | None:
        if any(one is None for one in values):
            return None
        return _figure(
            *function(np.stack([np.asarray(v) for v in values]), resamples=self.resamples)
        )

    def _contrast(
        self, weights: Sequence[float], *sets: Sequence[Looked | None]
    ) -> dict[str, Any] | None:
        """Of identity matches, picture by picture; None where a set lacks a seed or matches."""
        hits = []
        if len(sets) == 2 and all(a is b and a and a.matches is not None for a, b in zip(*sets)):
            return _figure(0.0, (0.0, 0.0))  # one model: whatever it draws, there is no difference
        for one in sets:
            found = [None if seen is None else seen.matches for seen in one]
            if any(f is None for f in found):
                return None
            hits.append(np.stack([np.asarray(f) for f in found]))
        return _figure(*contrast_over_runs(weights, hits, resamples=self.resamples))

    def _kid_difference(
        self, seen: Sequence[Looked], plain: Sequence[Looked | None]
    ) -> dict[str, Any] | None:
        found = []
        for one, other in zip(seen, plain, strict=True):
            if other is None or len(one.features) < LEAST or len(one.real) < LEAST:
                return None
            found.append(kid_difference(one.features, other.features, one.real))
        return _mean_kid(found)

    def _gain_kept(
        self, domain: str, seeds: Sequence[int], seen: Sequence[Looked], plain: Sequence[Looked | None]
    ) -> dict[str, Any] | None:  # fmt: skip
        if any(one is None for one in plain):
            return None
        base = self._of[NONE, NOBODY, domain, seeds[0]].losses
        found = ratio_over_runs(
            base, np.stack([one.losses for one in plain if one]), np.stack([one.losses for one in seen]),
            resamples=self.resamples,
        )  # fmt: skip
        return None if found is None else _figure(*found)


# --- figures -----------------------------------------------------------------------------------------


def _share(seen: Looked) -> dict[str, Any] | None:
    """Share of the pictures that show who was asked for: this model's, so Wilson's interval holds."""
    if seen.matches is None:
        return None
    by_subject = {
        subject: float(np.mean([m for m, s in zip(seen.matches, seen.subjects, strict=True) if s == subject]))
        for subject in dict.fromkeys(seen.subjects)
    }  # fmt: skip
    hits, count = int(seen.matches.sum()), len(seen.matches)
    return {**_figure(hits / count, wilson(hits, count)), "by_subject": by_subject}


def _mean_kid(found: Sequence[Estimate | None]) -> dict[str, Any] | None:
    """Over seeds. All are measured against the same real pictures, whose luck no seed averages out: the ends
    are averaged as if all of it were that, and united with Student's t over the seeds."""
    estimates = [one for one in found if one is not None]
    if not estimates or len(estimates) < len(found):
        return None
    values = [one.value for one in estimates]
    low, high = (float(np.mean([one.interval[i] for one in estimates])) for i in (0, 1))
    each = student(values) or (low, high)
    return _figure(float(np.mean(values)), (min(low, each[0]), max(high, each[1])))


def _gain(base: Looked, plain: Looked | None, seen: Looked) -> float | None:
    """(L_base - L) / (L_base - L_none) of held-out pictures; None where the unguarded user gains nothing."""
    if plain is None or not (gain := float(base.losses.mean() - plain.losses.mean())) > 0:
        return None
    return float(base.losses.mean() - seen.losses.mean()) / gain


def _figure(value: float, ends: Interval) -> dict[str, Any]:
    return {"value": float(value), "ci95": [float(ends[0]), float(ends[1])]}


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else _figure(estimate.value, estimate.interval)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [one for one in values if one is not None]
    return float(np.mean(there)) if there and len(there) == len(values) else None


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def _check_each(what: str, values: np.ndarray, pictures: Any) -> None:
    if values.shape != (len(pictures),):
        raise InputError(
            f"{what}: must give one value a picture, {len(pictures)}, gave {values.shape}"
        )
