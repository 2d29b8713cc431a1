"""Training shadow LoRAs: many at once in one process, and groups of them as tasks of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffward.errors import InputError
from diffward.finetune.cluster import on_ray
from diffward.finetune.loop import train
from diffward.finetune.many import Job, group_size, train_many
from diffward.finetune.method import METHODS
from diffward.finetune.settings import Settings
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.finetune.method import Method
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

MOST = {None: 64, "ray": 2}  # shadows in a group, if so many fit one pass


@dataclass(frozen=True)
class Group:
    """Shadows that are trained together: pictures, settings and file of each; their checkpoint."""

    rows: list[np.ndarray]
    settings: list[Settings]
    files: list[Path]

    @property
    def checkpoint(self) -> Path:
        mark = sha256(" ".join(f.name for f in self.files).encode()).hexdigest()[:12]
        return self.files[0].parent / f"training-{mark}.pt"


def train_shadows(
    denoiser: Denoiser,
    features: Features,
    inside: np.ndarray,
    settings: Sequence[Settings],
    files: Sequence[Path],
    *,
    cluster: str | None = None,
    method: Method | None = None,
) -> None:
    """Train the LoRAs whose files are missing, shadow s on the pictures `inside[s]`; inside is (S, N).

    Leaves no adapter on the denoiser. A stopped run goes on from the checkpoints beside the files.
    """
    if cluster not in MOST:
        raise InputError(f"--cluster {cluster}: choose ray, or leave it out")
    due = [s for s, file in enumerate(files) if not file.exists()]
    size = min(MOST[cluster], group_size(denoiser, settings[0].batch))
    size = size if _stackable(settings[0]) else 1
    groups = [
        Group([np.flatnonzero(inside[s]) for s in part], [settings[s] for s in part], [files[s] for s in part])
        for part in (due[i : i + size] for i in range(0, len(due), size))
    ]  # fmt: skip
    denoiser.detach()
    if cluster == "ray" and groups:
        shared, gpu = (denoiser, features, method), denoiser.device.type == "cuda"
        with progress("shadow groups", len(groups)) as bar:
            for _ in on_ray(train_group, shared, groups, gpu):
                bar.advance()
    else:
        for group in groups:
            train_group(denoiser, features, method, group)
    if not all(file.exists() for file in files):
        raise InputError(
            f"{files[0].parent}: the cluster's machines did not write there; choose a folder they all see"
        )
    # Of other groups, stopped and not gone on with.
    for left in files[0].parent.glob("training-*.pt"):
        left.unlink()


def train_group(
    denoiser: Denoiser, features: Features, method: Method | None, group: Group
) -> None:
    """Train a group from its checkpoint or from the start, and write its LoRAs."""
    from diffward.lora import write_lora

    parts = [_part(features, rows) for rows in group.rows]
    if _stackable(group.settings[0]):
        results = train_many(
            denoiser, [Job(*job) for job in zip(parts, group.settings)], method=method,
            checkpoint=group.checkpoint, at_once=len(parts),
        )  # fmt: skip
    else:
        method = method or METHODS["plain"].obj()
        (part,), (settings,) = parts, group.settings
        results = [train(denoiser, part, method, settings, checkpoint=group.checkpoint)]
    for result, file in zip(results, group.files, strict=True):
        assert result.weights is not None
        write_lora(result.weights, file, "diffusers")
    group.checkpoint.unlink(missing_ok=True)
    denoiser.detach()


def _stackable(settings: Settings) -> bool:
    """Whether `train_many` takes such runs; the others are trained one by one."""
    return not settings.text_encoder and settings.accumulate == 1


def _part(features: Features, rows: np.ndarray) -> Features:
    chosen = torch.from_numpy(rows).to(features.latents.device)
    return replace(
        features,
        latents=features.latents[chosen],
        captions=[features.captions[r] for r in rows],
        names=[features.names[r] for r in rows],
        _caption_index=features._caption_index[chosen],
    )
