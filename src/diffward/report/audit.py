"""The audit: one LoRA or full model, the base it was made for, and pictures, to the report's figures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffward.provenance import hardware, versions
from diffward.report.build import PerImage, build_report
from diffward.report.images import thumbnail
from diffward.report.membership import AuditOptions, audit_membership
from diffward.report.schema import Question
from diffward.report.sides import Sides, load_sides, sides_of_folders, sides_of_split
from diffward.report.subject import AuditedLora, open_audited
from diffward.report.weights import WeightsOptions, audit_weights

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

__all__ = [
    "AuditOptions",
    "Sides",
    "WeightsOptions",
    "audit_lora",
    "load_sides",
    "sides_of_folders",
    "sides_of_split",
    "thumbnail",
]


def audit_lora(
    denoiser: Denoiser | None,
    file: str | Path,
    sides: Sides | None,
    options: AuditOptions | None = None,
    *,
    weights: WeightsOptions | None = None,
    thumbnails: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], PerImage | None]:
    """Audit one file or folder. Without `sides` only the file itself is looked at; a base lets its weights be read.

    Args:
        denoiser: the base; None reads the header alone.
        weights: what is asked of the weights of a LoRA.
        file: a LoRA of any layout, or a fully fine-tuned model (`models.full`).

    Returns:
        The report (see `report.schema`) and the scores of the pictures, for `write_report`.

    Raises:
        InputError: the file is broken, is neither a LoRA nor a full model, or is for another base.
    """
    began = time.monotonic()
    options = options or AuditOptions()
    audited = open_audited(file, shadows=options.shadows)
    leaks = [leak.to_dict() for leak in audited.leaks]
    membership, per_image = None, None
    if sides is not None:
        assert denoiser is not None
        membership, per_image = audit_membership(denoiser, audited, sides, options)
        if thumbnails:
            per_image["thumbnails"] = [thumbnail(p.load(64)) for p in sides.everyone]
    questions: list[Question] = []
    notes: list[str] = []
    if denoiser is not None and isinstance(audited, AuditedLora):
        read = audited.file.load()
        questions, drawn, notes = audit_weights(
            denoiser,
            read,
            sides,
            weights or WeightsOptions(seed=options.seed, captions=options.captions == "known"),
        )
        if per_image is not None and drawn:
            per_image["drawn"] = drawn
    provenance = {
        **versions(),
        "device": hardware(str(denoiser.device) if denoiser else "none"),
        "seeds": {"pairs": options.seed, "split": sides.seed if sides else None},
        "wall_seconds": round(time.monotonic() - began, 2),
        "notes": [*(sides.notes if sides else []), *audited.notes, *notes],
        "config": config or {},
    }
    return build_report(audited.facts(), leaks, membership, provenance, questions), per_image
