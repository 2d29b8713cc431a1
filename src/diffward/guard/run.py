"""A whole run of a guard: from folders of two domains to a mask, or to edited weights."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffward.data import Pictures
from diffward.errors import InputError, TrainingError
from diffward.files import write_json
from diffward.guard.artefacts import EDIT, MASK, put_edit, read_edit
from diffward.guard.budget import choose
from diffward.guard.domains import Domains
from diffward.guard.learn import mask_from
from diffward.guard.mask import FreezeMask
from diffward.guard.options import check_options
from diffward.guard.plot import draw_mask
from diffward.guard.processes import together, world
from diffward.guard.stored import Stored
from diffward.guard.subject import GUARDS, Found, Subject, check_domains
from diffward.models.features import Features, encode_pictures
from diffward.provenance import hardware, versions, write_config

if TYPE_CHECKING:
    from diffward.guard.settings import GuardSettings
    from diffward.models.denoiser import Denoiser

PLOT, RUN, WORK = "mask.png", "run.json", "work"


@dataclass
class Learned:
    """What a run left in its folder: a mask, or edited weights.

    Attributes:
        file: the artefact.
        before: whether an earlier run had finished it.
    """

    file: Path
    mask: FreezeMask | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    before: bool = False


def run_learning(
    denoiser: Denoiser,
    domains: Domains,
    method: str,
    settings: GuardSettings,
    out: Path,
    *,
    concepts: Sequence[str] = (),
    guide: str = "",
    edit: str | None = None,
    config: dict[str, Any] | None = None,
    cache: bool = True,
) -> Learned:
    """Run a guard and write what it gives to `out`.

    Writes `mask.json` and `mask.png`, or `edit.safetensors`; `config.yaml` and `run.json`. What a resumed run
    needs lies in `work` until it has finished. Running it again resumes, or returns at once if it had finished.

    Args:
        method: one of `GUARDS`.
        concepts, guide: words that `uce` erases, and what stands in their place.
        edit: edited weights to start from: the mask is then of the edited base.

    Raises:
        InputError: `out` holds another run, a domain is empty, the two share pictures, the budget freezes nothing or
            everything, or a setting is one that the method does not look at.
        TrainingError: a loss of the simulated fine-tuning was not finite.
    """
    guard = GUARDS[method].obj
    began = time.monotonic()
    check_options(method, settings, concepts, guide)
    edited = put_edit(denoiser, read_edit(edit, denoiser)) if edit else []
    identity = _identity(denoiser, domains, method, settings, concepts, guide)
    if (done := _finished(out, identity)) is not None:
        return done
    illegal, innocent = (
        _encode(denoiser, side, cache) for side in (domains.illegal, domains.innocent)
    )
    hashes = set(domains.illegal.hashes), set(domains.innocent.hashes)
    check_domains(method, illegal, innocent, hashes)
    subject = Subject(denoiser, illegal, innocent, settings, out / WORK, list(concepts), guide)
    if "budget" in GUARDS[method].extra["options"]:
        # Too small or too large a one shows before hours of work.
        choose(torch.zeros(len(subject.names)), subject.costs, settings.budget)
    first = world()[1] == 0
    if first:
        write_json(out / WORK / RUN, identity)
        write_config({**(config or {}), **asdict(settings)}, out / "config.yaml")
    found = guard(subject)
    learned = _artefact(subject, method, found, domains, out)
    if edited and learned.mask:
        learned.mask.facts["edited_tensors"] = len(edited)
    together()
    if first:
        _write(learned, found)
        write_json(out / RUN, {
            "method": method, **learned.facts, "wall_seconds": time.monotonic() - began,
            "versions": versions(), "hardware": hardware(str(denoiser.device)), "settings": asdict(settings),
        })  # fmt: skip
        for path in (out / WORK).iterdir():
            if path.name != RUN:
                path.unlink()
    return learned


def start_processes(device: str) -> None:
    """Under `accelerate launch`: join the other processes, each on a device of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


# --- parts -------------------------------------------------------------------------------------------


def _encode(denoiser: Denoiser, pictures: Pictures, cache: bool) -> Features:
    if len(pictures):
        return encode_pictures(denoiser, pictures, cache=cache)
    nothing = torch.zeros(0, dtype=torch.long)
    return Features(torch.zeros(0, *denoiser.latent_shape), [], [], torch.zeros(0), nothing)


def _identity(
    denoiser: Denoiser, domains: Domains, method: str, settings: GuardSettings, concepts: Sequence[str], guide: str
) -> dict[str, Any]:  # fmt: skip
    """What must not change between a run and its resumption."""
    told: dict[str, Any] = {}
    for key, value in asdict(settings).items():
        told |= (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return {
        **{k: v for k, v in told.items() if not k.endswith("checkpoint_every")},
        **domains.digest(), "domains": domains.facts(), "method": method, "concepts": list(concepts), "guide": guide,
        "base": denoiser.unet_identity, "resolution": denoiser.resolution, "precision": str(denoiser.compute_dtype),
    }  # fmt: skip


def _finished(out: Path, identity: dict[str, Any]) -> Learned | None:
    """What a finished run left in `out`; None where the same run is to go on, or to begin.

    Raises:
        InputError: `out` holds another run.
    """
    hint = "choose another --out, or delete the folder to start anew"
    results = [out / name for name in (RUN, MASK, EDIT) if (out / name).exists()]
    if not (out / WORK / RUN).exists():
        if results:
            raise InputError(f"{results[0]}: is there already, and not of this run; {hint}")
        return None
    try:
        told = dict(json.loads((out / WORK / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{out / WORK / RUN}: cannot be read; {hint}") from error
    if changed := sorted(
        k for k in identity.keys() | told.keys() if identity.get(k) != told.get(k)
    ):
        raise InputError(f"{out}: holds a run with another {', '.join(changed)}; {hint}")
    if not (out / RUN).exists():
        return None
    if (out / MASK).exists():
        return Learned(out / MASK, FreezeMask.load(out / MASK), before=True)
    # Somebody took the artefact away: make it again.
    return Learned(out / EDIT, before=True) if (out / EDIT).exists() else None


def _artefact(subject: Subject, method: str, found: Found, domains: Domains, out: Path) -> Learned:
    """The mask that follows from scores, or the edit."""
    if found.edited is not None:
        for name, tensor in found.edited.items():
            if not torch.isfinite(tensor).all():
                raise TrainingError(f"{method}: the edited {name} is not finite; nothing was saved")
        return Learned(
            out / EDIT, facts={"edited_tensors": len(found.edited), "found": found.facts}
        )
    mask = mask_from(subject, method, found, domains.facts())
    keep = ("budget", "domains", "losses", "found")
    facts = {
        "frozen_tensors": len(mask.frozen), "tensor_share": mask.tensor_share, "parameter_share": mask.parameter_share,
        **{key: mask.facts[key] for key in keep if key in mask.facts},
    }  # fmt: skip
    return Learned(out / MASK, mask, facts)


def _write(learned: Learned, found: Found) -> None:
    if learned.mask:
        learned.mask.save(learned.file)
        draw_mask(learned.mask, learned.file.with_name(PLOT))
    elif found.edited is not None:
        Stored.write(learned.file, found.edited)
