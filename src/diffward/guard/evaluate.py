"""What attackers still can do with a guarded base: guards x attackers x domains x seeds, measured.

Every cell fine-tunes the guarded base and draws pictures from seeds that all guards share, so that guards are
compared picture by picture. Nothing here chooses anything on what it measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.errors import InputError
from diffward.guard.attackers import ATTACKERS, AttackSettings
from diffward.guard.cells import Cell, Cells, load_sheets, save_sheets
from diffward.guard.compare import NOBODY, Judge, Looked, Table
from diffward.guard.sides import Guarded as Guarded
from diffward.guard.sides import Side as Side
from diffward.guard.sides import check_sides, complete, prompts_of
from diffward.guard.sides import random_matched as random_matched
from diffward.models.parameters import parameters_of
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.eyes import Eye

SCHEMA = "diffward.guard/1"
DEFAULT_ATTACKERS = ("full", "lora", "lora-kept", "dreambooth", "unfreeze")


@dataclass
class EvaluateSettings:
    """Settings of `guard evaluate`; names are those of the command line."""

    attackers: list[str] = field(default_factory=lambda: list(DEFAULT_ATTACKERS))
    """who attacks: full, lora, lora-kept, dreambooth, unfreeze; nobody (the guarded base as it is)"""
    innocent_attackers: list[str] = field(default_factory=list)
    """who fine-tunes in the allowed domain; without any, the same"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """training runs; a claim needs three"""
    pictures: int = 24
    """pictures drawn of each subject"""
    innocent_pictures: int = 96
    """pictures drawn in the allowed domain, prompts in turn"""
    draw_steps: int = 20
    """denoising steps a picture"""
    guidance: float = 5.0
    """classifier-free guidance"""
    draw_seed: int = 0
    """seed of the drawn pictures and of the noise that losses are measured with"""
    pairs: int = 8
    """noise draws a held-out picture"""
    resamples: int = 2000
    """of the bootstrap"""
    attack: AttackSettings = field(default_factory=AttackSettings)

    def __post_init__(self) -> None:
        if not self.attackers or not self.seeds:
            raise InputError("--attackers and --seeds: name at least one")
        for name in ("attackers", "innocent_attackers", "seeds"):
            given = getattr(self, name)
            if len(set(given)) != len(given):
                raise InputError(f"--{name.replace('_', '-')}: one is there twice")
        for name in [*self.attackers, *self.innocent_attackers]:
            ATTACKERS[name]
        if min(self.seeds) < 0 or self.draw_seed < 0:
            raise InputError("--seeds and --draw-seed must not be negative")
        for name, least in (
            ("pictures", 1), ("innocent_pictures", 1), ("draw_steps", 1), ("pairs", 2), ("resamples", 100),
        ):  # fmt: skip
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(self, name)}: must be at least {least}")
        if not 0 <= self.guidance < 1e3:
            raise InputError(f"--guidance {self.guidance}: must be 0 or above")


@dataclass
class Evaluation:
    """What was found.

    Attributes:
        data: the JSON, schema diffward.guard/1; `rows` a guard, attacker, domain and seed each, `summary` over seeds.
        work: where the drawn pictures lie.
    """

    data: dict[str, Any]
    work: Path

    def pictures(self, row: Mapping[str, Any]) -> np.ndarray:
        """The pictures uint8 (n, H, W, 3) of one of `data["rows"]`, subject by subject; or of a domain's `reference`.

        Raises:
            InputError: they are not in `work` any more.
        """
        try:
            return load_sheets(self.work, row["cell"], row["shape"])
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.work}: the pictures of {row['cell']} are gone; run guard evaluate again"
            ) from error


def evaluate(
    denoiser: Denoiser,
    guards: Sequence[Guarded],
    illegal: Side,
    innocent: Side,
    settings: EvaluateSettings,
    work: Path,
    *,
    eye: Eye,
) -> Evaluation:
    """Attack every guard in both domains and measure what comes of it.

    Every fine-tuned model is kept in `work` as its pictures and losses; a cell of an earlier run is taken
    again where data, guard and settings are the same. Figures are computed anew from the pictures each time.
    The base is bit for bit the same afterwards, and between cells.

    Args:
        guards: "none" is added where it is missing; "random" (`random_matched`, one a seed) is what a
            learned guard must beat.
        work: folder for what is kept.

    Raises:
        InputError: guards that are not for this base, two of one name for a seed, domains that lack what is
            asked of them.
        TrainingError: a fine-tuning went wrong (with guard, attacker, domain and seed), or the base changed.
    """
    guards = complete(denoiser, guards, settings)
    sides = {"illegal": illegal, "innocent": innocent}
    check_sides(sides, settings)
    work.mkdir(parents=True, exist_ok=True)
    cells = Cells(denoiser, sides, settings, work)
    try:
        judges = {
            name: Judge(side, prompts_of(side, settings), eye) for name, side in sides.items()
        }
        plan = _plan(cells, guards, settings)
        distinct = {cell.key: cell for cell in plan}
        found: dict[str, Looked] = {}
        with progress("evaluate", len(distinct)) as bar:
            for key, cell in distinct.items():
                outcome = cells.kept(cell) or cells.run(cell)
                found[key] = judges[cell.domain].look(outcome)
                bar.advance(f"{cell.guard.name}/{cell.attacker}, {cell.domain}, seed {cell.seed}")
    finally:
        cells.close()
    table = Table([(cell, found[cell.key]) for cell in plan], settings.resamples)
    sizes = {name: p.numel() for name, p in parameters_of(denoiser.unet).items()}
    data = {
        "schema": SCHEMA,
        # A result is passed on: where the base lay on this machine is nobody's business.
        "base": {
            "name": denoiser.public_name,
            "identity": denoiser.unet_identity, "tensors": len(sizes), "parameters": sum(sizes.values()),
        },
        "eye": eye.name,
        "identity_by": "galleries" if illegal.match is None else "match",
        "settings": asdict(settings),
        "domains": {
            name: {
                "subjects": list(dict.fromkeys(s for s, _ in prompts_of(side, settings) if s)),
                "training": len(side.training), "held_out": len(side.held_out), "real": len(side.real),
                "reference": _reference(side, work, name),
            }
            for name, side in sides.items()
        },
        "guards": [_told(guard, sizes) for guard in guards],
        "attackers": [
            {"name": name, "summary": ATTACKERS[name].summary, "keeps": ATTACKERS[name].extra["keeps"]}
            for name in dict.fromkeys(cell.attacker for cell in plan)
        ],
        "rows": table.rows(),
        "summary": table.summary(),
    }  # fmt: skip
    return Evaluation(data, work)


# --- parts -------------------------------------------------------------------------------------------


def _plan(cells: Cells, guards: Sequence[Guarded], settings: EvaluateSettings) -> list[Cell]:
    """A cell a row. The base as it is comes first: losses are measured from it."""
    plan = []
    for domain, attackers in (
        ("illegal", settings.attackers), ("innocent", settings.innocent_attackers or settings.attackers),
    ):  # fmt: skip
        for seed in settings.seeds:
            own = [guard for guard in guards if guard.seed in (None, seed)]
            plan.append(cells.plan(own[0], NOBODY, domain, seed))
            for attacker in attackers:
                for guard in own:
                    if attacker != NOBODY or guard is not own[0]:
                        plan.append(cells.plan(guard, attacker, domain, seed))
    return plan


def _reference(side: Side, work: Path, domain: str) -> dict[str, Any] | None:
    """A real picture of each subject, for whoever looks at the grids; None without galleries."""
    subjects = list(side.prompts) if isinstance(side.prompts, Mapping) else []
    known = side.galleries or {}
    if not subjects or not all(subject in known and len(known[subject]) for subject in subjects):
        return None
    pixels = np.stack([known[subject][0] for subject in subjects])
    save_sheets(pixels, work, f"{domain}-reference")
    return {"cell": f"{domain}-reference", "shape": list(pixels.shape)}


def _told(guard: Guarded, sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": guard.name, "seed": guard.seed, "frozen_tensors": len(set(guard.frozen)),
        "tensor_share": len(set(guard.frozen)) / len(sizes),
        "parameter_share": sum(sizes[name] for name in set(guard.frozen)) / sum(sizes.values()),
        "edited_tensors": len(guard.edit), "facts": guard.facts,
    }  # fmt: skip
