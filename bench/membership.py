"""Every membership attack on LoRAs of known exposure, with its controls.

Targets: LoRAs trained on random halves of one pool of portraits, at several passes over each picture,
two ranks and three seeds; a seed is another split. Shadow LoRAs (lira, lira_offline, rmia) at rank 8 and
10 passes: beyond they cost more than all else, and `calibrated` leaves them nothing to find.
Photographs: see `real_pictures`.

Resumable: what is trained or audited is kept in runs/bench-membership.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench._result import record
from bench._support import attack_rows
from diffward.data import Pictures, load_pictures, random_split
from diffward.files import write_json
from diffward.finetune.settings import Settings
from diffward.lora import write_lora
from diffward.membership.statistics import cluster_interval
from diffward.models.load import load_base
from diffward.models.mini import world
from diffward.report.membership import AuditOptions, audit_membership
from diffward.report.sides import Sides, sides_of_split

WORK = Path("runs/bench-membership")
POOL = 11  # seed of the pictures


@dataclass(frozen=True)
class Target:
    """One LoRA: which pictures, how many passes over each, which rank, which split."""

    dataset: str
    exposure: int
    rank: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}-x{self.exposure}-r{self.rank}-s{self.seed}"

    def settings(self) -> Settings:
        return Settings(
            epochs=self.exposure, batch=8, lr=1e-3, schedule="cosine", rank=self.rank, alpha=self.rank,
            targets="all", seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured: pictures a side, exposures, ranks, seeds; shadows up to an exposure."""

    dataset: str
    side: int
    exposures: tuple[int, ...]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    shadows: int = 8
    shadowed: int = 10

    def audits(self, target: Target) -> Iterator[str]:
        """What is asked of a target: kinds of audit."""
        yield "known"
        if target.rank != self.ranks[0]:
            return
        if target.seed == self.seeds[0]:
            yield "unknown"
            yield "thorough"
        if target.exposure <= self.shadowed:
            yield "shadows"

    def targets(self) -> Iterator[Target]:
        for rank in self.ranks:
            for exposure in self.exposures:
                for seed in self.seeds:
                    yield Target(self.dataset, exposure, rank, seed)


FULL = Plan("mini portraits", 200, (10, 50, 200), (8, 64), (0, 1, 2))
QUICK = Plan("mini portraits", 12, (4,), (8,), (0,), shadows=4, shadowed=4)


def run(quick: bool = False) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(QUICK, Path(folder))
    else:
        rows = measure(FULL, WORK)
    record("membership", rows, seeds=FULL.seeds, quick=quick, notes=[
        "targets: random halves of one pool; LoRA on all layers, AdamW, learning rate 1e-3 falling along a "
        "cosine, batch 8; a seed is another split and another start",
        "seed all: the mean over the seeds, with an interval that resamples runs and pictures",
        "exposure: passes over each picture; captions unknown: the attacker has the pictures alone (rank 8, seed 0)",
        "secmi, secmi_nn, mlp, blackbox: rank 8, seed 0",
        f"lira, lira_offline, rmia: {FULL.shadows} shadow LoRAs, rank 8, at most {FULL.shadowed} passes",
    ])  # fmt: skip


def measure(plan: Plan, work: Path) -> list[dict[str, Any]]:
    """Train and audit all that is missing; one row an attack and audit, and one over the seeds."""
    train_targets(plan, work)
    rows = []
    for rank in plan.ranks:
        for exposure in plan.exposures:
            targets = [t for t in plan.targets() if (t.rank, t.exposure) == (rank, exposure)]
            for kind in ("known", "unknown", "thorough", "shadows"):
                found = [
                    audit(plan, target, kind, work)
                    for target in targets
                    if kind in plan.audits(target)
                ]
                rows += [row for one in found for row in one["rows"]]
                if len(found) > 1:
                    rows += over_seeds(found)
    return rows


def over_seeds(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an attack with the mean AUC over the runs, and an interval that also resamples runs."""
    rows = []
    for row in found[0]["rows"]:
        runs = []
        for one in found:
            scores = np.array(one["scores"][row["attack"]])
            member = np.array(one["member"])
            runs.append((scores[member], scores[~member]))
        value, interval = cluster_interval(runs)
        same = ("dataset", "exposure", "rank", "base", "captions", "attack", "queries_per_image")
        each = [r for one in found for r in one["rows"] if r["attack"] == row["attack"]]
        mean = {
            key: float(np.mean([r[key] for r in each])) for key in ("base_model_auc", "blind_auc")
        }
        rows.append(
            {
                **{key: row[key] for key in same}, "seed": "all", "auc": value, "auc_ci95": list(interval),
                "auc_signfree": max(value, 1 - value), "tpr_at_fpr": _mean_tpr(each), **mean,
                "n_members": sum(r["n_members"] for r in each), "n_non_members": sum(r["n_non_members"] for r in each),
            }
        )  # fmt: skip
    return rows


def _mean_tpr(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {k: float(np.mean([r["tpr_at_fpr"][k] for r in rows])) for k in rows[0]["tpr_at_fpr"]}


def pool(plan: Plan, work: Path) -> Pictures:
    """The pictures from which every target's members and non-members come."""
    folder = work / "pictures"
    if not (folder / "metadata.jsonl").exists():
        drawn = [world.sample([POOL, i], domain="portrait") for i in range(2 * plan.side)]
        world.save_folder(drawn, folder)
    return load_pictures(folder)


def sides(plan: Plan, target: Target, pictures: Pictures) -> Sides:
    manifest = random_split(
        pictures, n_members=plan.side, n_non_members=plan.side, seed=target.seed
    )
    return sides_of_split(pictures, manifest)


def train_targets(plan: Plan, work: Path) -> None:
    """Train the targets that are missing, those of a rank and an exposure at once, the cheap ones first."""
    from diffward.finetune.many import Job, train_many
    from diffward.models.features import encode_pictures

    pictures = pool(plan, work)
    for exposure in plan.exposures:
        for rank in plan.ranks:
            group = [t for t in plan.targets() if (t.rank, t.exposure) == (rank, exposure)]
            due = [t for t in group if not _file(work, t).exists()]
            if not due:
                continue
            denoiser = load_base("mini", device="cpu")
            jobs = []
            for target in due:
                members = sides(plan, target, pictures).members
                jobs.append(Job(encode_pictures(denoiser, members, cache=False), target.settings()))
            checkpoint = work / f"targets-x{exposure}-r{rank}.pt"
            results = train_many(denoiser, jobs, checkpoint=checkpoint)
            for target, result in zip(due, results, strict=True):
                assert result.weights is not None
                write_lora(result.weights, _file(work, target), "diffusers")
                write_json(
                    _file(work, target).parent / "run.json",
                    {"passes_per_picture": result.exposure, "steps": result.steps},
                )
            checkpoint.unlink()


THOROUGH = ("secmi", "secmi_nn", "mlp", "blackbox")
SHADOWED = ("lira", "lira_offline", "rmia")


def audit(plan: Plan, target: Target, kind: str, work: Path) -> dict[str, Any]:
    """{rows, scores, member} of one audit, from the file where it was kept."""
    kept = _file(work, target).parent / f"audit-{kind}.json"
    if not kept.exists() or "scores" not in json.loads(kept.read_text(encoding="utf-8")):
        options = AuditOptions(
            attacks=",".join({"thorough": THOROUGH, "shadows": SHADOWED}.get(kind, ()))
            or "standard",
            captions="unknown" if kind == "unknown" else "known",
            shadows=plan.shadows if kind == "shadows" else 0,
            shadow_epochs=target.exposure,
            shadow_lr=target.settings().lr,
            shadow_schedule=target.settings().schedule,
            shadow_folder=work / f"shadows-x{target.exposure}-r{target.rank}",
        )
        split = sides(plan, target, pool(plan, work))
        found, each = audit_membership(
            load_base("mini", device="cpu"), _file(work, target), split, options
        )
        rows = attack_rows(
            found,
            **asdict(target),
            base="mini",
            captions=options.captions,
            evaluations_made=found["evaluations_per_image"]["made"],
            evaluations_one_by_one=found["evaluations_per_image"]["one_by_one"],
        )
        for row in rows:
            if row["attack"] == "cdi":
                row["dataset_inference"] = found["dataset_inference"]
        write_json(kept, {"rows": rows, "scores": each["scores"], "member": each["member"]})
    return dict(json.loads(kept.read_text(encoding="utf-8")))


def _file(work: Path, target: Target) -> Path:
    return work / target.name.replace(" ", "-") / "pytorch_lora_weights.safetensors"
