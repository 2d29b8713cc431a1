"""Private fine-tuning: what each method keeps of the pictures' quality, and what every attack still finds.

Every method trains on the same pictures, those of new fictional people of `mini`'s world and photographs
of clothes, and is audited by the standard suite on pictures that no method compared. Plain LoRA at several
lengths of training is the curve to stand above. See private_cases for what is compared, private_rows for
what the columns mean, private_cost for what a step costs.

Resumable at every stage: what is trained, audited or drawn is kept in runs/bench-private-lora. Several
processes may run at once and share the work. `python -m bench.private_lora` writes the table from what is
there, naming what is missing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._claim import claimed
from bench._result import record, with_recorded
from bench.private_cases import (
    CLOTHING,
    QUICK,
    QUICK_SIZES,
    SEEDS,
    SHARES,
    Case,
    Material,
    Share,
    Sizes,
    clothing_material,
    data_root,
    people_material,
)
from bench.private_cost import cost_rows
from bench.private_rows import NOTES, draw_curve, table_rows
from bench.private_utility import Pressure, measure_utility, read_utility
from diffward.errors import InputError, TrainingError
from diffward.files import atomic_path, sha256_file, write_json

if TYPE_CHECKING:
    from diffward.finetune.method import Auxiliary, Method
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

WORK = Path("runs/bench-private-lora")
CURVE = Path("docs/private-curve.png")
WEIGHTS, FULL = "pytorch_lora_weights.safetensors", "unet.safetensors"
KEY = ("base", "dataset", "method", "settings", "exposure", "seed")  # what tells rows apart
WAIT = 10.0  # seconds between looks at work that another process has
PRIOR_PROMPT, PRIOR_COUNT = "a portrait of a person", 64


def run(quick: bool = False) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            write(Bench(QUICK, Path(folder), QUICK_SIZES), quick=True)
    else:
        write(Bench(SHARES, WORK, Sizes()), quick=False)


def write(bench: Bench, quick: bool, work: bool = True) -> None:
    """Do what is missing (if `work`), then record all that is there."""
    notes = bench.work_through() if work else []
    rows, missing = table_rows(bench)
    rows += cost_rows(bench.work, bench.cpu_seconds, quick=quick, measure_missing=work)
    if not quick:
        rows = with_recorded("private-lora", rows, KEY)
        missing = [(told, case) for told, case in missing if not any(_is_row(r, case) for r in rows)]  # fmt: skip
    record("private-lora", rows, seeds=SEEDS, quick=quick, notes=[
        *NOTES, *bench.absent, *notes,
        *([f"not measured yet: {', '.join(told for told, _ in missing)}"] if missing else []),
    ])  # fmt: skip
    if not quick:
        draw_curve(rows, CURVE)


class Bench:
    """The cases of some shares, and what is kept of them in `work`."""

    def __init__(self, shares: Sequence[Share], work: Path, sizes: Sizes) -> None:
        self.work, self.sizes = work, sizes
        self.absent: list[str] = []
        photographs = (data_root() / CLOTHING).is_dir()
        if not photographs and any(share.dataset == CLOTHING for share in shares):
            self.absent.append(f"no photographs: {data_root()} has none; set DIFFWARD_DATA")
        self.cases = [
            case for share in shares if photographs or share.dataset != CLOTHING for case in share.cases()
        ]  # fmt: skip
        self.material = lru_cache(maxsize=None)(self._material)
        self.held = lru_cache(maxsize=None)(self._held)

    @cached_property
    def denoiser(self) -> Denoiser:
        from diffward.models.load import load_base

        return load_base("mini", device="cpu")  # type: ignore[no-any-return]

    def file(self, case: Case, name: str | None = None) -> Path:
        """One of a case's files; its weights if no name is given."""
        weights = FULL if case.settings.tune == "full" else WEIGHTS
        return self.work / case.name / (name or weights)

    # --- the work --------------------------------------------------------------------------------

    def work_through(self) -> list[str]:
        """Finish every case, what others have begun included; says what could not be finished."""
        troubles: dict[str, str] = {}
        for dataset, seed in dict.fromkeys((c.dataset, c.seed) for c in self.cases):
            with claimed(self.work / f"base-{dataset}-s{seed}".replace(" ", "-"), wait=True):
                self.base_utility(dataset, seed)
        due = self.cases
        while due:
            left = []
            for case in due:
                try:
                    if not self._finish(case):
                        left.append(case)
                except (InputError, TrainingError) as error:
                    troubles[case.training] = f"{case.training}: {error}"
                except Exception as error:
                    # One broken method must not cost the night's other measurements.
                    traceback.print_exc()
                    troubles[case.training] = f"{case.training}: {type(error).__name__}: {error}"
            if len(left) == len(due):
                time.sleep(WAIT)
            due = left
        return list(troubles.values())

    def _finish(self, case: Case) -> bool:
        """Do what is missing of a case; False where another process is at it."""
        stages: list[tuple[str, Callable[[Case], bool], Callable[[Case], None]]] = [
            (case.training, self.is_trained, self._train),
            (case.name, self.is_measured, self._measure),
        ]
        for name, done, do in stages:
            if not done(case):
                with claimed(self.work / name) as mine:
                    if not mine:
                        return False
                    if not done(case):
                        print(f"{'train' if do == self._train else 'measure'} {case.name}")
                        do(case)
        return True

    def is_trained(self, case: Case) -> bool:
        """Whether the weights are there, of these settings.

        Raises:
            TrainingError: such a run failed before.
        """
        failed = _read(self.work / f"{case.training}.failed.json")
        if failed and _filled(failed["settings"]) == _plain(case.settings):
            raise TrainingError(failed["error"])
        told = _read(self.file(case, "run.json"))
        same = told and _filled(told["settings"]) == _plain(case.settings)
        return bool(same and self.file(case).exists())

    def is_measured(self, case: Case) -> bool:
        """Whether audit and utility are there, of the weights that are there."""
        if not self.is_trained(case):
            return False
        digest = sha256_file(self.file(case))
        kept = [_read(self.file(case, name)) for name in ("audit.json", "utility.json")]
        return all(one and one["weights"] == digest for one in kept)

    def _train(self, case: Case) -> None:
        """Train a run; every case of it gets its weights."""
        from diffward.finetune import METHODS, train
        from diffward.lora import write_lora
        from diffward.models.features import encode_pictures

        material, settings = self.material(case.dataset, case.seed), case.settings
        method: Method = METHODS[case.method].obj()
        pressed = Pressure(method)
        members, held = self.held(case.dataset, case.seed)
        total = settings.total_steps(len(members))
        at = {round(c.passes / case.recipe.at[-1] * total): c for c in case.siblings}
        folder = self.work / f"{case.training}-running"
        began, cpu, whole = time.monotonic(), time.process_time(), not folder.exists()

        def keep(of: Case, weights: Any, steps: int, passes: float, **more: Any) -> None:
            if of.settings.tune == "full":
                write_unet(self.denoiser, self.file(of))
            else:
                write_lora(weights, self.file(of), "diffusers", more.get("facts"))
            write_json(self.file(of, "run.json"), {
                "method": of.method, "settings": _plain(of.settings), "steps": steps, "passes_per_picture": passes,
                "wall_seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu,
                "whole": whole, "effective_weight": pressed.effective, **more,
            })  # fmt: skip

        def snapshot(step: int) -> None:
            adapter = self.denoiser.trainable_adapter
            if step in at and step < total and adapter is not None:
                keep(at[step], adapter.weights(), step, at[step].passes)

        prior = None
        if case.recipe.prior:
            prior = encode_pictures(self.denoiser, self._prior())
        try:
            result = train(
                self.denoiser, members, method, settings, auxiliary=held, prior=prior,
                checkpoint=folder / "checkpoint.pt", groups=material.groups, on_step=snapshot,
            )  # fmt: skip
        except TrainingError as error:
            told = {"settings": _plain(settings), "error": str(error)}
            write_json(self.work / f"{case.training}.failed.json", told)
            raise
        else:
            keep(
                case.siblings[-1], result.weights, result.steps, result.exposure, kept_at=result.kept_at,
                readings=[asdict(reading) for reading in result.readings], facts=result.facts,
            )  # fmt: skip
        finally:
            self.denoiser.detach()
            if settings.tune == "full":
                del self.denoiser  # it is another model now
        shutil.rmtree(folder)
        if not all(self.is_trained(c) for c in case.siblings):
            # The run was stopped between a checkpoint and a snapshot.
            self._train(case)

    def _measure(self, case: Case) -> None:
        from diffward.report.membership import AuditOptions, audit_membership
        from diffward.report.subject import open_audited

        digest, material = sha256_file(self.file(case)), self.material(case.dataset, case.seed)
        kept = _read(self.file(case, "audit.json"))
        if not kept or kept["weights"] != digest:
            found, each = audit_membership(
                self.denoiser, self.file(case), material.sides, AuditOptions()
            )
            told = {"membership": found, "scores": each["scores"], "member": each["member"]}
            write_json(self.file(case, "audit.json"), {"weights": digest, **told})
        open_audited(self.file(case)).attach(self.denoiser)
        measure_utility(
            self.denoiser, *self._subject(case.dataset, case.seed), self.file(case, "utility.json"), digest
        )  # fmt: skip
        self.denoiser.detach()

    def base_utility(self, dataset: str, seed: int) -> dict[str, Any]:
        """`utility` of the untouched base."""
        file = self.work / f"base-{dataset}-s{seed}".replace(" ", "-") / "utility.json"
        if not file.exists():
            self.denoiser.detach()
            measure_utility(self.denoiser, *self._subject(dataset, seed), file, "")
        return read_utility(file)

    def _subject(self, dataset: str, seed: int) -> tuple[Material, Features, int]:
        return self.material(dataset, seed), self.held(dataset, seed)[1].validation, seed

    # --- the pictures ----------------------------------------------------------------------------

    def _material(self, dataset: str, seed: int) -> Material:
        if dataset == CLOTHING:
            return clothing_material(seed)
        folder = self.work / f"people-s{seed}"
        with claimed(folder, wait=True):
            return people_material(folder, seed, self.sizes)

    def _held(self, dataset: str, seed: int) -> tuple[Features, Auxiliary]:
        """What trains, and what every method may compare."""
        from diffward.finetune.auxiliary import build_auxiliary
        from diffward.models.features import encode_pictures

        material = self.material(dataset, seed)
        held = build_auxiliary(
            self.denoiser, material.pictures, material.manifest, material.training, seed=seed
        )
        return encode_pictures(self.denoiser, material.training), held

    def _prior(self) -> Any:
        from diffward.finetune.prior import draw_prior

        self.denoiser.detach()
        folder = self.work / "class-pictures"
        with claimed(folder, wait=True):
            return draw_prior(self.denoiser, PRIOR_PROMPT, PRIOR_COUNT, 0, folder)

    def cpu_seconds(self) -> list[tuple[Case, float]]:
        """Of the runs that were made in one go, teachers and gauge included."""
        found = []
        for case in self.cases:
            told = _read(self.file(case, "run.json"))
            if case == case.siblings[-1] and told and told["whole"]:
                found.append((case, float(told["cpu_seconds"])))
        return found


def _is_row(row: dict[str, Any], case: Case) -> bool:
    """Whether a row is of this case. Where a method ends a run early, the exposure is not what was asked for."""
    same = (row.get("dataset"), row["method"], row["settings"], row.get("seed")) == (
        case.dataset, case.method, case.told, case.seed
    )  # fmt: skip
    return same and (case.method == "earlystop" or abs(row["exposure"] - case.passes) < 0.5)


def write_unet(denoiser: Denoiser, file: Path) -> None:
    """The whole UNet as it now is."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        save_file({k: v.contiguous() for k, v in denoiser.unet.state_dict().items()}, temporary)


def _plain(settings: Any) -> Any:
    """Settings as they are when read back from JSON."""
    return json.loads(json.dumps(asdict(settings)))


def _filled(told: dict[str, Any]) -> dict[str, Any]:
    """Settings of a kept run; those that came later stand at their defaults."""
    from diffward.finetune.settings import Settings

    def fill(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        return defaults | {
            k: fill(defaults[k], v) if isinstance(v, dict) and k in defaults else v
            for k, v in own.items()
        }

    return fill(_plain(Settings()), told)


def _read(file: Path) -> dict[str, Any] | None:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


if __name__ == "__main__":
    sys.exit(write(Bench(SHARES, WORK, Sizes()), quick=False, work=False))
