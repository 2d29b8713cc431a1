"""Building a zoo: shard by shard, each LoRA of a shard trained at once; a stopped build goes on where it was."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.errors import InputError
from diffward.files import atomic_path, sha256_file
from diffward.inversion.recipe import Ranges, Recipe, draw_recipes, saved_at
from diffward.inversion.subjects import TRAINING, Subjects, open_subjects
from diffward.inversion.zoo import (
    HEAD,
    LOCK,
    Head,
    Row,
    Zoo,
    need_parquet,
    read_head,
    read_manifest,
    rows_of,
    shard_file,
    write_head,
    write_manifest,
)
from diffward.progress import progress

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser
    from diffward.models.stacked import StackedAdapter


@dataclass(frozen=True)
class Source:
    """How a worker gets at the base: by name, since models do not travel between processes."""

    base: str
    device: str = "auto"
    precision: str = "auto"
    config: str | None = None

    def load(self, resolution: int | None = None) -> Denoiser:
        from diffward.models.load import load_base

        return load_base(
            self.base, device=self.device, precision=self.precision, resolution=resolution, config=self.config
        )  # fmt: skip


def build_zoo(
    folder: Path, source: Source, subjects_name: str, ranges: Ranges, *, count: int, seed: int = 0,
    per_shard: int = 64, test_share: float = 0.15, workers: int = 1, cluster: str | None = None,
    resolution: int | None = None,
) -> Zoo:  # fmt: skip
    """Train what is missing of a zoo of `count` LoRAs; shards that are damaged are made anew.

    LoRA number i is of subject number i (modulo the subjects that there are). Raises InputError: another build is
    at work in the folder, the folder's zoo is another one, or the subjects do not fit the base.
    """
    for name, value, least in (
        ("count", count, 1),
        ("per-shard", per_shard, 1),
        ("workers", workers, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    if not 0 <= test_share < 2 / 3:
        raise InputError(
            f"--test-share {test_share}: must be 0 or above, and below 2/3 so that some subjects train"
        )
    if cluster not in (None, "ray"):
        raise InputError(f"--cluster {cluster}: choose ray, or leave it out")
    need_parquet()
    with locked(folder):
        denoiser = source.load(resolution)
        subjects = open_subjects(subjects_name, seed=seed, side=denoiser.resolution)
        head = Head(
            base=denoiser.public_name, base_identity=denoiser.unet_identity, resolution=denoiser.resolution,
            subjects=subjects_name, subjects_digest=subjects.digest, attributes=subjects.attributes, seed=seed, count=count, per_shard=per_shard,
            test_share=test_share, ranges=asdict(ranges), modules=_modules(denoiser, ranges),
        )  # fmt: skip
        _same_zoo(folder, head)
        write_head(folder, head)
        rows, sums = read_manifest(folder, head)
        if damaged := (Zoo(folder).damaged if rows else []):
            print(f"damaged shards are made anew: {', '.join(map(str, damaged))}")
            rows = [row for row in rows if row.shard not in damaged]
        done = {row.shard for row in rows}
        due = [s for s in range(head.shards) if s not in done]
        with progress("zoo: shards", head.shards, len(done)) as bar:
            for shard, made, digest in _made(
                folder, source, denoiser, subjects, head, ranges, due, workers, cluster
            ):
                rows, sums = rows + made, sums | {shard: digest}
                write_manifest(folder, head, sorted(rows, key=lambda r: (r.shard, r.place)), sums)
                bar.advance(f"{len({row.lora for row in rows})} LoRAs")
        shutil.rmtree(folder / "partial", ignore_errors=True)
    return Zoo(folder)


def build_shard(
    folder: Path, denoiser: Denoiser, subjects: Subjects, head: Head, ranges: Ranges, shard: int
) -> tuple[int, list[Row], str]:
    """Train a shard's LoRAs, from its checkpoint if there is one; gives its rows and the hash of its file."""
    from diffward.finetune.many import Job, train_many

    numbers = list(range(shard * head.per_shard, min(head.count, (shard + 1) * head.per_shard)))
    recipes = draw_recipes(ranges, head.seed, shard, len(numbers))
    identities = [number % len(subjects) for number in numbers]
    work = folder / "partial" / f"shard-{shard:05d}"
    work.mkdir(parents=True, exist_ok=True)
    saves = [saved_at(recipe.steps, ranges.checkpoints) for recipe in recipes]
    features = [
        _features(denoiser, subjects, identity, number, recipe)
        for identity, number, recipe in zip(identities, numbers, recipes, strict=True)
    ]
    # A subject may have fewer pictures than were drawn for the recipe.
    recipes = [replace(r, pictures=len(own)) for r, own in zip(recipes, features, strict=True)]
    jobs = [
        Job(own, recipe.settings(ranges)) for own, recipe in zip(features, recipes, strict=True)
    ]

    def keep(step: int, adapter: StackedAdapter) -> None:
        for k, job in enumerate(adapter.labels):
            file = work / f"{job}-{step}.safetensors"
            if step in saves[job] and not file.exists():
                _write_save(file, adapter, k)

    file, checkpoint = shard_file(folder, shard), work / "training.pt"
    files = [work / f"{k}-{step}.safetensors" for k, steps in enumerate(saves) for step in steps]
    train_many(denoiser, jobs, checkpoint=checkpoint, at_once=len(jobs), on_step=keep)
    if not all(save.exists() for save in files):
        # Stopped while saves were written: the checkpoint is past them. From the start, for these alone.
        checkpoint.unlink()
        train_many(denoiser, jobs, checkpoint=checkpoint, at_once=len(jobs), on_step=keep)
    _join(files, head, file)
    labels = [subjects.label(identity) for identity in identities]
    rows = rows_of(head, shard, numbers, recipes, saves, labels, identities)
    return shard, rows, sha256_file(file)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """This process has the folder to itself; the lock is void at once if it dies."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another zoo build is at work there; wait for it, or choose another --out"
            ) from None
        yield


def _made(
    folder: Path, source: Source, denoiser: Denoiser, subjects: Subjects, head: Head, ranges: Ranges,
    due: list[int], workers: int, cluster: str | None,
) -> Iterator[tuple[int, list[Row], str]]:  # fmt: skip
    """The shards as they are finished: here, in `workers` processes, or as Ray tasks."""
    if cluster == "ray":
        from diffward.finetune.cluster import on_ray

        shared = (folder.resolve(), denoiser, subjects, head, ranges)
        yield from on_ray(build_shard, shared, due, denoiser.device.type == "cuda")
        return
    if workers == 1 or len(due) < 2:
        for shard in due:
            yield build_shard(folder, denoiser, subjects, head, ranges, shard)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, _start, (folder, source, head, ranges, workers)
    ) as pool:
        waiting = [pool.submit(_work, shard) for shard in due]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()  # as Ctrl-C would: they save their checkpoints
            raise


_WORKER: list[Callable[[int], tuple[int, list[Row], str]]] = []


def _start(folder: Path, source: Source, head: Head, ranges: Ranges, workers: int) -> None:
    import os
    import signal

    import torch

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    denoiser = source.load(head.resolution)
    subjects = open_subjects(head.subjects, seed=head.seed, side=denoiser.resolution)
    _WORKER.append(partial(build_shard, folder, denoiser, subjects, head, ranges))


def _work(shard: int) -> tuple[int, list[Row], str]:
    return _WORKER[0](shard)


def _features(
    denoiser: Denoiser, subjects: Subjects, identity: int, number: int, recipe: Recipe
) -> Any:
    import torch

    from diffward.models.features import Features

    portraits = subjects.pictures(identity, recipe.pictures, [TRAINING, number])
    captions = [recipe.caption(p.caption) for p in portraits]
    distinct = list(dict.fromkeys(captions))
    return Features(
        denoiser.encode(np.stack([p.pixels for p in portraits])), captions,
        [f"subject {identity}, picture {i}" for i in range(len(portraits))], denoiser.condition(distinct),
        torch.tensor([distinct.index(c) for c in captions], device=denoiser.device),
    )  # fmt: skip


def _write_save(file: Path, adapter: StackedAdapter, k: int) -> None:
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, layer in adapter.layers.items():
        down, up = layer.factors(k)
        tensors |= {f"{name}.down": down.to(torch.float16), f"{name}.up": up.to(torch.float16)}
    with atomic_path(file) as temporary:
        save_file({key: t.contiguous() for key, t in tensors.items()}, temporary)


def _join(files: list[Path], head: Head, out: Path) -> None:
    """One file of the saves, stacked in this order."""
    import torch
    from safetensors.torch import load_file, save_file

    saves = [load_file(file) for file in files]
    keys = [f"{name}.{role}" for name in head.modules for role in ("down", "up")]
    with atomic_path(out) as temporary:
        save_file({key: torch.stack([save[key] for save in saves]) for key in keys}, temporary)
    shutil.rmtree(files[0].parent, ignore_errors=True)


def _modules(denoiser: Denoiser, ranges: Ranges) -> dict[str, list[int]]:
    """The adapted modules and the shapes of their weights."""
    adapter = denoiser.inject(1, 1, recipe_targets(ranges), text_encoder=False)
    names = list(adapter.layers())
    denoiser.detach()
    shapes = denoiser.module_shapes()
    return {name: list(shapes[name]) for name in names}


def recipe_targets(ranges: Ranges) -> list[str]:
    from diffward.finetune.settings import Settings

    return Settings(targets=ranges.targets).target_modules()


def _same_zoo(folder: Path, head: Head) -> None:
    """Another count may follow: a zoo grows. Anything else would mix two zoos."""
    if not (folder / HEAD).exists():
        return
    old, new = asdict(read_head(folder)), asdict(head)
    changed = [key for key in new if key != "count" and new[key] != old[key]]
    if changed or new["count"] < old["count"]:
        raise InputError(
            f"{folder}: is a zoo with another {', '.join(changed) or 'larger count'}; choose another --out"
        )
    if old["count"] % head.per_shard and old["count"] != head.count:
        raise InputError(
            f"{folder}: its last shard is not full ({old['count']} LoRAs, {head.per_shard} a shard), so it cannot grow"
        )
