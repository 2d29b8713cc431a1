"""The audit: one LoRA or full model, the base it was made for, and pictures, to the report's figures."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.provenance import hardware, versions
from diffward.report.build import PerImage, build_report
from diffward.report.membership import AuditOptions, audit_membership
from diffward.report.sides import Sides, load_sides, sides_of_folders, sides_of_split
from diffward.report.subject import open_audited

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

__all__ = [
    "AuditOptions",
    "Sides",
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
    thumbnails: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], PerImage | None]:
    """Audit one file or folder. Without `sides` only the file itself is looked at and no base is needed.

    Args:
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
    provenance = {
        **versions(),
        "device": hardware(str(denoiser.device) if denoiser else "none"),
        "seeds": {"pairs": options.seed, "split": sides.seed if sides else None},
        "wall_seconds": round(time.monotonic() - began, 2),
        "notes": [*(sides.notes if sides else []), *audited.notes],
        "config": config or {},
    }
    return build_report(audited.facts(), leaks, membership, provenance), per_image


def thumbnail(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
