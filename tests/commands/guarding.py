"""What the tests of `diffward guard` share: command lines, drawn pictures, a mask that was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffward.commands.main import main

TINY = [
    "--tune-steps", "2", "--updates", "2", "--interval", "1", "--batch", "2", "--device", "cpu", "--cache", "false",
]  # fmt: skip
TRAIN = ["--steps", "2", "--batch", "2", "--device", "cpu", "--cache", "false", "--seed", "3"]


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return int(stop.value.code or 0)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = call(*args)
    out, err = capsys.readouterr()
    return code, out, err


def draw(folder: Path, n: int = 4, seed: int = 7) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        block = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(block).resize((24, 24), Image.Resampling.BICUBIC)
        image.save(folder / f"secret-name-{i}.png")
        (folder / f"secret-name-{i}.txt").write_text(f"a secret caption {i}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def changed_mask(learned: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((learned / "mask.json").read_text())
    change(data)
    to.write_text(json.dumps(data))
    return to


def one_line(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The line that a refused command prints; it exits with 2 and writes no traceback."""
    code, _, err = run(capsys, *args)
    lines = [line for line in err.strip().splitlines() if line.startswith("diffward")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
