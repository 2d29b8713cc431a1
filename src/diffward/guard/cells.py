"""One fine-tuned model at a time: attacked, drawn from, measured on held-out pictures, and kept.

What is kept are the drawn pictures themselves, so that any eye may look at them later, and the losses.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from diffward.errors import TrainingError
from diffward.files import atomic_path, write_json
from diffward.guard.attackers import ATTACKERS, Effort
from diffward.guard.sides import prompts_of
from diffward.guard.stored import Stored
from diffward.models.pairs import Pairs
from diffward.models.parameters import hashes, parameters_of, put, tensor_hash
from diffward.models.sampling import sample

if TYPE_CHECKING:
    from diffward.guard.evaluate import EvaluateSettings
    from diffward.guard.sides import Guarded, Side
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

SCHEMA = "diffward.guard.cell/1"
PER_SHEET = 64  # pictures in one PNG: more of them would look like a decompression bomb


@dataclass(frozen=True)
class Cell:
    """What one model is a function of: `run` in full, `key` (its file's name) by hash."""

    key: str
    run: dict[str, Any]
    guard: Guarded
    attacker: str
    domain: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Drawn pictures uint8 (n, H, W, 3), losses (m,) of the held-out ones, and what the attack took."""

    pixels: np.ndarray
    losses: np.ndarray
    effort: Effort


class Cells:
    """Runs cells on one base and keeps them in a folder; the base is put back, bit for bit, after each."""

    def __init__(
        self, denoiser: Denoiser, sides: Mapping[str, Side], settings: EvaluateSettings, work: Path
    ) -> None:
        self.denoiser, self.sides, self.settings, self.work = denoiser, sides, settings, work
        denoiser.detach()
        self._hashes = hashes(parameters_of(denoiser.unet), parameters_of(denoiser.unet))
        self._edits: dict[int, str] = {}
        self._told = {
            "base": denoiser.unet_identity, "resolution": denoiser.resolution,
            "precision": str(denoiser.compute_dtype),
            "draw": [settings.draw_seed, settings.draw_steps, settings.guidance, settings.pairs],
        }  # fmt: skip
        self._domains = {
            name: {
                "training": side.training.digest(), "held_out": side.held_out.digest(),
                "prompts": [prompt for _, prompt in prompts_of(side, settings)],
            }
            for name, side in sides.items()
        }  # fmt: skip
        self._file = work / "base.safetensors"
        self._base = Stored.write(self._file, parameters_of(denoiser.unet), denoiser.device)

    def close(self) -> None:
        """Put the base back, and drop the copy of it."""
        self._restore()
        self._file.unlink(missing_ok=True)

    def plan(self, guard: Guarded, attacker: str, domain: str, seed: int) -> Cell:
        """The cell of a row. Rows that come to the same model by construction have the same one."""
        kind = ATTACKERS[attacker].extra
        run = {
            **self._told, **self._domains[domain], "kind": kind["kind"], "seed": seed,
            "frozen": _hash("\0".join(sorted(guard.frozen))) if kind["keeps"] and guard.frozen else "",
            "edit": self._edit(guard),
        }  # fmt: skip
        if kind["kind"] == "nobody":
            del run["training"]
        else:
            given = asdict(self.settings.attack)
            run["attack"] = {
                k: v for k, v in given.items() if kind["prior"] or not k.startswith("prior")
            }
        if kind["prior"]:
            run["class"] = self.sides[domain].class_prompt
        told = _hash(json.dumps(run, sort_keys=True))
        return Cell(f"{domain}-{kind['kind']}-s{seed}-{told}", run, guard, attacker, domain, seed)

    def kept(self, cell: Cell) -> Outcome | None:
        """What an earlier run found; None where there is nothing whole of this very cell."""
        try:
            told = json.loads((self.work / f"{cell.key}.json").read_text(encoding="utf-8"))
            if told["schema"] != SCHEMA or told["run"] != cell.run:
                return None
            pixels = load_sheets(self.work, cell.key, told["shape"])
            if _hash(pixels.tobytes()) != told["pixels"]:
                return None
            return Outcome(pixels, np.array(told["losses"]), Effort(**told["effort"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def run(self, cell: Cell) -> Outcome:
        """Attack, draw, measure, keep.

        Raises:
            TrainingError: the fine-tuning went wrong, or the base could not be put back.
            InputError: the attacker cannot work with these settings or pictures.
        """
        denoiser, side = self.denoiser, self.sides[cell.domain]
        where = f"{cell.guard.name}/{cell.attacker}, {cell.domain} domain, seed {cell.seed}"
        with self._guarded(cell.guard):
            entry = ATTACKERS[cell.attacker]
            prior = self._prior(cell) if entry.extra["prior"] else None
            try:
                effort = entry.obj(
                    denoiser,
                    side.training,
                    cell.guard.frozen,
                    self.settings.attack,
                    cell.seed,
                    prior,
                )
            except TrainingError as error:
                raise TrainingError(f"{where}: {error}") from error
            losses = self._losses(side.held_out)
            if not np.isfinite(losses).all():
                raise TrainingError(
                    f"{where}: the loss of held-out pictures is not finite; lower --attack.lr"
                )
            pixels = sample(
                denoiser, cell.run["prompts"], seed=self.settings.draw_seed + cell.seed,
                steps=self.settings.draw_steps, guidance=self.settings.guidance,
            )  # fmt: skip
        outcome = Outcome(pixels, losses, effort)
        save_sheets(pixels, self.work, cell.key)
        # Last of all: a cell is there when this file is.
        write_json(self.work / f"{cell.key}.json", {
            "schema": SCHEMA, "run": cell.run, "shape": list(pixels.shape), "pixels": _hash(pixels.tobytes()),
            "losses": losses.tolist(), "effort": asdict(effort),
        })  # fmt: skip
        return outcome

    @contextmanager
    def _guarded(self, guard: Guarded) -> Iterator[None]:
        """Within the block the UNet is the guarded base's; afterwards the base's, and it is made sure of."""
        put(self.denoiser.unet, guard.edit)
        try:
            yield
        finally:
            self._restore()
        own = parameters_of(self.denoiser.unet)
        if own.keys() != self._hashes.keys() or hashes(own, own) != self._hashes:
            raise TrainingError(
                "the base is not what it was before the attack; nothing more is measured"
            )

    def _restore(self) -> None:
        self.denoiser.detach()
        put(self.denoiser.unet, self._base)
        self.denoiser.unet.requires_grad_(False)
        for parameter in self.denoiser.unet.parameters():
            parameter.grad = None

    def _losses(self, held_out: Features) -> np.ndarray:
        """Mean loss (m,) of each held-out picture under noise that all cells share."""
        pairs = Pairs.draw(self.denoiser, self.settings.pairs, self.settings.draw_seed)
        errors = pairs.errors(self.denoiser, held_out, torch.arange(len(held_out)))
        return errors.double().mean(dim=1).numpy()

    def _prior(self, cell: Cell) -> Features:
        """Class pictures as the attacker gets them: drawn by the guarded base."""
        from diffward.finetune.prior import draw_prior
        from diffward.models.features import encode_pictures

        count, prompt = self.settings.attack.prior_count, self.sides[cell.domain].class_prompt
        told = [self._told, cell.run["edit"], prompt, count]
        folder = self.work / f"prior-{_hash(json.dumps(told))}"
        drawn = draw_prior(self.denoiser, prompt, count, self.settings.draw_seed, folder)
        return encode_pictures(self.denoiser, drawn, cache=False)

    def _edit(self, guard: Guarded) -> str:
        if id(guard) not in self._edits:
            told = {name: tensor_hash(guard.edit[name]) for name in sorted(guard.edit)}
            self._edits[id(guard)] = _hash(json.dumps(told)) if told else ""
        return self._edits[id(guard)]


def save_sheets(pixels: np.ndarray, work: Path, key: str) -> None:
    """Pictures uint8 (n, H, W, 3) as PNGs, `PER_SHEET` of them in a square of places in each."""
    for number, start in enumerate(range(0, len(pixels), PER_SHEET)):
        some = pixels[start : start + PER_SHEET]
        _, height, width, _ = some.shape
        wide, tall = _places(len(some))
        sheet = np.zeros((wide * tall, height, width, 3), dtype=np.uint8)
        sheet[: len(some)] = some
        sheet = sheet.reshape(tall, wide, height, width, 3).transpose(0, 2, 1, 3, 4)
        with atomic_path(work / f"{key}.{number}.png") as temporary:
            Image.fromarray(sheet.reshape(tall * height, wide * width, 3)).save(temporary)


def load_sheets(work: Path, key: str, shape: Sequence[int]) -> np.ndarray:
    """The pictures (n, H, W, 3) of a cell. Raises OSError or ValueError where they are not of this shape."""
    count, height, width, _ = shape
    parts = []
    for number, start in enumerate(range(0, count, PER_SHEET)):
        size = min(PER_SHEET, count - start)
        wide, tall = _places(size)
        with Image.open(work / f"{key}.{number}.png") as image:
            sheet = np.asarray(image.convert("RGB")).reshape(tall, height, wide, width, 3)
        parts.append(sheet.transpose(0, 2, 1, 3, 4).reshape(-1, height, width, 3)[:size])
    return np.concatenate(parts)


def _places(count: int) -> tuple[int, int]:
    """Columns and rows of a sheet."""
    wide = math.isqrt(count - 1) + 1
    return wide, -(-count // wide)


def _hash(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]
