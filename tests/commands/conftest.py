"""A finished run of `guard learn`, and a case for `guard evaluate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands.guarding import TINY, call, draw


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The forbidden and the allowed domain."""
    root = tmp_path_factory.mktemp("domains")
    return draw(root / "forbidden", 5, seed=1), draw(root / "allowed", 4, seed=2)


@pytest.fixture(scope="module")
def learning(folders: tuple[Path, Path], base_folder: Path) -> list[object]:
    """The command line that learns, without --out."""
    illegal, innocent = folders
    return [
        "guard", "learn", "--illegal", illegal, "--innocent", innocent, "--base", base_folder, *TINY,
        "--illegal-name", "drawn squares",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def learned(learning: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed: copy it first."""
    out = tmp_path_factory.mktemp("learned") / "out"
    assert call(*learning, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny image model of random weights."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("eye")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return f"transformers:{folder}"


@pytest.fixture(scope="module")
def case(base_folder: Path, eye: str, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The command line that evaluates, without guards and --out: subjects ann and bob, and eve, who is nobody's."""
    root = tmp_path_factory.mktemp("case")
    for seed, name in enumerate(("ann", "bob")):
        draw(root / "train" / name, 2, seed=10 + seed)
        draw(root / "held" / name, 2, seed=20 + seed)
    draw(root / "others" / "eve", 3, seed=30)
    return [
        "guard", "evaluate", "--illegal", root / "train", "--illegal-held-out", root / "held",
        "--others", root / "others", "--innocent", draw(root / "in", 2, seed=40), "--innocent-held-out",
        draw(root / "in-held", 2, seed=41), "--base", base_folder, "--eye", eye, "--attackers", "[full]", "--seeds", "[0]",
        "--pictures", 2, "--innocent-pictures", 2, "--draw-steps", 2, "--pairs", 2, "--resamples", 100,
        "--attack.steps", 1, "--attack.batch", 2, "--device", "cpu", "--cache", "false",
    ]  # fmt: skip
