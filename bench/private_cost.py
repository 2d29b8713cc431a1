"""What a private step costs: time and memory of each method against plain LoRA, on `mini` and at real size.

`python -m bench.private_cost WAY BASE` trains a few steps in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from bench._claim import claimed
from bench._support import draw_folder, interleaved, measure
from bench.train_step import SD15, SD15_RESOLUTION
from diffward.files import write_json

if TYPE_CHECKING:
    from bench.private_cases import Case
    from diffward.finetune.method import Auxiliary, Method
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

SEED, RANK, LR = 0, 8, 1e-3
TOTAL = 1200  # steps of the run that the measured ones are the first of
WARM = 2


@dataclass(frozen=True)
class Way:
    """A method and the settings it is measured with."""

    method: str
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}".strip()


PAPER, TEXT = {"privacy": {"paper": True}}, {"targets": "text"}
WAYS = (
    Way("plain"), Way("earlystop"), Way("smp"), Way("mp"), Way("hinge"), Way("dual"), Way("moment"),
    Way("dp", "epsilon 8", {"dp": {"noise": 1.0}}), Way("distill"), Way("distill", "folds 4", {"privacy": {"folds": 4}}),
    Way("smp", "as in the paper", PAPER), Way("mp", "as in the paper", PAPER),
    Way("plain", "text", TEXT), Way("distill", "text", TEXT),
)  # fmt: skip
QUICK = tuple(way for way in WAYS if way.name in ("plain", "smp", "distill"))
# A step takes seconds there: one of each kind. mp, hinge and dual differ from smp by a few numbers.
LARGE = tuple(
    way for way in WAYS if way.name in ("plain", "smp", "moment", "dp epsilon 8", "distill")
)


@dataclass(frozen=True)
class Place:
    """A base to measure on, and how much; steps are a multiple of 4, the period of what is done now and then."""

    base: str
    batch: int
    rounds: int
    steps: int
    peaks: int


MINI, REAL = Place("mini", 8, 5, 16, 1), Place(SD15, 4, 2, 4, 1)


def cost_rows(
    work: Path, cpu_seconds: Callable[[], list[tuple[Case, float]]], *, quick: bool, measure_missing: bool
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a base and method; measured once and kept in `work`.

    Args:
        cpu_seconds: processor time of the runs that were made in one go.
        measure_missing: False gives what is there.
    """
    rows = []
    places = (replace(MINI, rounds=3, steps=4, peaks=1),) if quick else (MINI, REAL)
    for place in places:
        file = work / f"cost-{place.base.replace(' ', '-')}.json"
        with claimed(file, wait=measure_missing) as mine:
            if mine and measure_missing and not file.exists():
                write_json(
                    file, compare(place, QUICK if quick else WAYS if place == MINI else LARGE)
                )
        if file.exists():
            rows += json.loads(file.read_text(encoding="utf-8"))
    whole = _whole_runs(cpu_seconds())
    return [
        row | ({"total_ratio": whole.get(_key(row))} if row["base"] == MINI.base else {})
        for row in rows
    ]


def _whole_runs(found: list[tuple[Case, float]]) -> dict[tuple[str, str], float]:
    """Mean ratio of a whole run's processor time to the plain one's of as many passes, targets and seed."""

    def about(case: Case) -> tuple[Any, ...]:
        recipe, targets = case.recipe, case.settings.targets
        return case.dataset, recipe.rank, targets, recipe.prior, recipe.at[-1], case.seed

    plain = {about(case): seconds for case, seconds in found if case.method == "plain"}
    ratios: dict[tuple[str, str], list[float]] = {}
    for case, seconds in found:
        if case.recipe.rank == RANK and about(case) in plain:
            key = case.method, case.recipe.label
            ratios.setdefault(key, []).append(seconds / plain[about(case)])
    return {key: mean(values) for key, values in ratios.items()}


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], row["settings"]


def compare(place: Place, ways: tuple[Way, ...]) -> list[dict[str, Any]]:
    """One row a way; a way that does not run says why."""
    rows = _times(place, ways)
    made = [row for row in rows if "outcome" not in row]
    names = [f"{row['method']} {row['settings']}".strip() for row in made]
    peaks = interleaved(place.peaks, *(_peak(name, place.base) for name in names))
    for row, peak in zip(made, peaks, strict=True):
        row |= {"memory_mb": median(peak), "memory_ratio": median(peak) / median(peaks[0])}
    return rows


def _times(place: Place, ways: tuple[Way, ...]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with prepared(place.base) as (denoiser, features, held):
        for way in ways:
            row = {
                "base": place.base, "resolution": denoiser.resolution, "batch": place.batch, "rank": RANK,
                "method": way.method, "settings": way.label,
            }  # fmt: skip
            steps = Steps(way, denoiser, features, held, place.batch)
            try:
                steps(1)
            except Exception as error:  # told in the row; the others are measured
                rows.append(row | {"outcome": f"{type(error).__name__}: {error}"})
            else:
                rows.append(row | {"steps": steps})
        made = [row for row in rows if "steps" in row]
        found = interleaved(place.rounds, *(_call(row["steps"], place.steps) for row in made))
    for row, seconds in zip(made, found, strict=True):
        ratio = median(own / plain for own, plain in zip(seconds, found[0], strict=True))
        row |= {"step_ratio": ratio, "seconds": median(seconds), "steps": place.rounds * place.steps}  # fmt: skip
    return rows


def _call(step: Steps, count: int) -> Callable[[], float]:
    return lambda: step(count)


def _peak(name: str, base: str) -> Callable[[], float]:
    return lambda: measure([sys.executable, "-m", "bench.private_cost", name, base]).peak_mb


class _Enough(Exception):
    """As many steps were made as are measured."""


class Steps:
    """The first steps of a run of one way; called with a number, gives the mean processor seconds of a step.

    The gauge's readings and the accountant's sums are made now and then and fall outside.
    """

    def __init__(
        self, way: Way, denoiser: Denoiser, features: Features, held: Auxiliary, batch: int
    ) -> None:
        self.way, self.denoiser, self.features, self.held = way, denoiser, features, held
        self.batch = batch

    def __call__(self, count: int) -> float:
        from diffward.finetune import train

        stamps: list[float] = []

        def stamp(step: int) -> None:
            stamps.append(time.process_time())
            if step == WARM + count:
                raise _Enough

        try:
            train(
                self.denoiser, self.features, _method(self.way), _settings(self.way, self.batch, TOTAL),
                auxiliary=self.held, on_step=stamp,
            )  # fmt: skip
        except _Enough:
            pass
        finally:
            self.denoiser.detach()
        return mean(b - a for a, b in itertools.pairwise(stamps[WARM:]))


def _settings(way: Way, batch: int, steps: int) -> Any:
    from diffward.finetune.settings import DP, GaugeOptions, Privacy, Settings

    options = {"targets": "all", **way.options}
    for name, kind in (("privacy", Privacy), ("dp", DP)):
        options[name] = kind(**options.get(name, {}))
    return Settings(
        steps=steps, batch=batch, rank=RANK, alpha=RANK, lr=LR, seed=SEED,
        gauge=GaugeOptions(pictures=2, pairs=2), **options,
    )  # fmt: skip


def _method(way: Way) -> Method:
    """The method; distill with teachers that never trained, as a step costs the same."""
    from diffward.finetune import METHODS

    method: Method = METHODS[way.method].obj()
    if way.method != "distill":
        return method
    from diffward.finetune.distill import folds_of

    def precede(denoiser: Denoiser, features: Features, settings: Any, order: list[int], *_: Any) -> None:  # fmt: skip
        folds = settings.privacy.folds
        method.fold = folds_of(len(features), None, folds, settings.seed)  # type: ignore[attr-defined]
        modules = settings.target_modules()
        # Not zero, as a new LoRA is: the student starts there and would have nothing to learn.
        drawn = denoiser.inject(RANK, RANK, modules, text_encoder=False, init=False).weights()
        method.teachers = [drawn] * folds  # type: ignore[attr-defined]
        denoiser.detach()

    method.precede = precede  # type: ignore[assignment, method-assign]
    return method


@contextmanager
def prepared(base: str) -> Iterator[tuple[Denoiser, Features, Auxiliary]]:
    """A base with 16 pictures to train on and 16 that do not."""
    import torch

    from diffward.data import load_pictures
    from diffward.finetune.method import Auxiliary
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import encode_pictures
    from diffward.models.load import load_base

    if base == SD15:
        from bench.make_sd15 import new_pipeline

        denoiser = Denoiser(new_pipeline(seed=SEED), SD15, resolution=SD15_RESOLUTION)
    else:
        denoiser = load_base(base, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        draw_folder(Path(folder), 32, [SEED, 17], size=denoiser.resolution)
        features = encode_pictures(denoiser, load_pictures(folder), cache=False)
    held = Auxiliary(
        torch.arange(8), features.of(range(16, 24)), torch.arange(8, 16), features.of(range(24, 32))
    )
    yield denoiser, features.of(range(16)), held


def _alone() -> None:
    """A whole short run of one way, for its peak memory."""
    from diffward.finetune import METHODS, train

    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=[way.name for way in WAYS])
    parser.add_argument("base", choices=[MINI.base, REAL.base])
    args = parser.parse_args()
    way = next(way for way in WAYS if way.name == args.way)
    place = next(place for place in (MINI, REAL) if place.base == args.base)
    with prepared(args.base) as (denoiser, features, held):
        settings = _settings(way, place.batch, 3 if args.base == SD15 else 5)
        train(denoiser, features, METHODS[way.method].obj(), settings, auxiliary=held)


if __name__ == "__main__":
    _alone()
