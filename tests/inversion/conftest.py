"""A small zoo on the tiny base: four subjects in folders, six LoRAs in two shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SMALL: dict[str, Any] = {"count": 6, "per_shard": 3, "seed": 3, "test_share": 0.3}


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four subjects with three pictures each; of the second the pictures have captions."""
    root, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for subject in range(4):
        folder = root / f"person {subject}"
        folder.mkdir()
        for i in range(3):
            corners = rng.integers(0, 256, (3, 2, 3)).astype(np.uint8)
            image = Image.fromarray(corners).resize((24, 20), Image.Resampling.BILINEAR)
            image.save(folder / f"{i}.png")
            if subject == 1:
                (folder / f"{i}.txt").write_text(f"a cup of {{name}} number {i}")
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("no folder")
    return root


@pytest.fixture(scope="session")
def small_ranges() -> Any:
    from diffward.inversion.recipe import Ranges

    return Ranges(
        steps="3:6", checkpoints=2, rank="1,3", pictures="1:3", lr="1e-3:1e-2", targets="to_k,to_v,conv1",
        templates="a photo of {name}|captions",
    )  # fmt: skip


@pytest.fixture(scope="session")
def build(base_folder: Path, faces: Path, small_ranges: Any) -> Callable[..., Any]:
    """`build(folder, count=3)`: the small zoo with something else."""

    def make(folder: Path, **changes: Any) -> Any:
        from diffward.inversion.build import Source, build_zoo

        options = {**SMALL, **changes}
        subjects = str(options.pop("subjects", faces))
        ranges = options.pop("ranges", small_ranges)
        return build_zoo(folder, Source(str(base_folder), "cpu"), subjects, ranges, **options)

    return make


@pytest.fixture(scope="session")
def straight(build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small zoo, built without a break. Not to be changed."""
    return build(tmp_path_factory.mktemp("zoos") / "straight")


@pytest.fixture
def zoo_copy(straight: Any, tmp_path: Path) -> Path:
    """A copy of it to do harm to."""
    folder = tmp_path / "copy"
    shutil.copytree(straight.folder, folder)
    assert json.loads((folder / "zoo.json").read_text())["count"] == 6
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of the jobs of each call of `train_many`."""
    import diffward.finetune.many as many

    whole = many.train_many
    calls: list[list[int]] = []

    def counting(denoiser: Any, jobs: Any, **options: Any) -> Any:
        calls.append([job.settings.seed for job in jobs])
        return whole(denoiser, jobs, **options)

    monkeypatch.setattr(many, "train_many", counting)
    return calls


def contents(folder: Path) -> dict[str, Any]:
    """What a zoo is: its head and shards as bytes, its rows."""
    from diffward.inversion.zoo import Zoo

    files = [folder / "zoo.json", *sorted((folder / "shards").glob("*.safetensors"))]
    return {f.name: f.read_bytes() for f in files} | {"rows": Zoo(folder).rows}


def seeds(zoo: Any, shard: int) -> list[int]:
    return list(dict.fromkeys(row.recipe["seed"] for row in zoo.rows if row.shard == shard))
