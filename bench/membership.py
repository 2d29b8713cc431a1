"""Every membership attack on LoRAs of known exposure, with its controls.

Targets: LoRAs trained on random halves of one pool of portraits, at several passes over each picture,
two ranks and three seeds; a seed is another split. Shadow LoRAs (lira, lira_offline, rmia) at rank 8 up
to 50 passes: beyond they cost more than all else. Photographs: see `real_pictures`.

Resumable: what is trained or audited is kept in runs/bench-membership.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench._result import record
from bench._support import attack_rows
from diffward.data import Pictures, load_pictures, random_split
from diffward.files import write_json
from diffward.finetune.settings import Settings
from diffward.lora import write_lora
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
    shadowed: int = 50

    def audits(self, target: Target) -> Iterator[str]:
        """What is asked of a target: kinds of audit."""
        yield "known"
        if target.seed == self.seeds[0]:
            yield "unknown"
            yield "thorough"
        if target.rank == self.ranks[0] and target.exposure <= self.shadowed:
            yield "shadows"

    def targets(self) -> Iterator[Target]:
        for rank in self.ranks:
            for exposure in self.exposures:
                for seed in self.seeds:
                    yield Target(self.dataset, exposure, rank, seed)


FULL = Plan("mini portraits", 200, (10, 50, 200), (8, 64), (0, 1, 2))
QUICK = Plan("mini portraits", 24, (4, 20), (8,), (0,), shadows=4, shadowed=4)


def run(quick: bool = False) -> None:
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(QUICK, Path(folder))
    else:
        rows = measure(FULL, WORK)
    seeds = sorted({row["seed"] for row in rows})
    record("membership", rows, seeds=seeds, quick=quick, notes=[
        "targets: random halves of one pool; LoRA on all layers, AdamW, learning rate 1e-3 falling along a "
        "cosine, batch 8; a seed is another split and another start",
        "exposure: passes over each picture; captions unknown: the attacker has the pictures alone (seed 0)",
        "secmi, secmi_nn, mlp, blackbox: seed 0",
        f"lira, lira_offline, rmia: {FULL.shadows} shadow LoRAs, rank 8, at most {FULL.shadowed} passes",
    ])  # fmt: skip


def measure(plan: Plan, work: Path) -> list[dict[str, Any]]:
    """Train and audit all that is missing; one row an attack and audit."""
    train_targets(plan, work)
    return [
        row
        for target in plan.targets()
        for kind in plan.audits(target)
        for row in audit(plan, target, kind, work)
    ]


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


def train_targets(plan: Plan, work: Path, ranks: tuple[int, ...] | None = None) -> None:
    """Train the targets that are missing, those of a rank at once."""
    from diffward.finetune.many import Job, train_many
    from diffward.models.features import encode_pictures

    pictures = pool(plan, work)
    for rank in ranks or plan.ranks:
        due = [t for t in plan.targets() if t.rank == rank and not _file(work, t).exists()]
        if not due:
            continue
        denoiser = load_base("mini", device="cpu")
        jobs = [
            Job(
                encode_pictures(denoiser, sides(plan, t, pictures).members, cache=False),
                t.settings(),
            )
            for t in due
        ]
        mark = hashlib.sha256(" ".join(t.name for t in due).encode()).hexdigest()[:8]
        results = train_many(denoiser, jobs, checkpoint=work / f"targets-r{rank}-{mark}.pt")
        for target, result in zip(due, results, strict=True):
            assert result.weights is not None
            write_lora(result.weights, _file(work, target), "diffusers")
            write_json(
                _file(work, target).parent / "run.json",
                {"passes_per_picture": result.exposure, "steps": result.steps},
            )


THOROUGH = ("secmi", "secmi_nn", "mlp", "blackbox")
SHADOWED = ("lira", "lira_offline", "rmia")


def audit(plan: Plan, target: Target, kind: str, work: Path) -> list[dict[str, Any]]:
    """Rows of one audit, from the file where it was kept."""
    kept = _file(work, target).parent / f"audit-{kind}.json"
    if not kept.exists():
        options = AuditOptions(
            attacks=",".join({"thorough": THOROUGH, "shadows": SHADOWED}.get(kind, ()))
            or "standard",
            captions="unknown" if kind == "unknown" else "known",
            shadows=plan.shadows if kind == "shadows" else 0,
            shadow_epochs=target.exposure,
            shadow_folder=work / f"shadows-x{target.exposure}-r{target.rank}",
        )
        split = sides(plan, target, pool(plan, work))
        found, _ = audit_membership(
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
        write_json(kept, {"rows": rows})
    return list(json.loads(kept.read_text(encoding="utf-8"))["rows"])


def _file(work: Path, target: Target) -> Path:
    return work / target.name.replace(" ", "-") / "pytorch_lora_weights.safetensors"
