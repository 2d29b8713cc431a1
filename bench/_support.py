"""What the speed tables share: processes measured from outside, interleaved rounds, bases to run on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# A process inherits the peak of whoever starts it (the kernel counts the memory that exec replaces):
# so a bare interpreter starts the one that is measured.
_LAUNCHER = """
import json, os, sys, time
began = time.monotonic()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
seconds = time.monotonic() - began
told = {"seconds": seconds, "peak": usage.ru_maxrss, "code": os.waitstatus_to_exitcode(status)}
with open(sys.argv[1], "w") as file:
    json.dump(told, file)
"""


@dataclass(frozen=True)
class Measured:
    """A process that ended well: wall seconds, peak resident memory (MB, 10^6 bytes), what it printed."""

    seconds: float
    peak_mb: float
    output: str


def measure(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Measured:
    """Run a program (by its full path) in the checkout's root and measure it from outside.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    # Where bytecode is never written, every start would pay for compiling the package anew.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "usage.json"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, told, *map(str, command)],
            cwd=ROOT, env={**inherited, **(env or {})}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        usage = json.loads(told.read_text()) if told.exists() else {"code": done.returncode or 1}
    if usage["code"]:
        tail = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {usage['code']}:\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(usage["seconds"], usage["peak"] * unit / 1e6, done.stdout)


def diffward(*arguments: str | Path) -> list[str]:
    """The command line of the `diffward` beside the interpreter that runs."""
    return [str(Path(sys.executable).parent / "diffward"), *map(str, arguments)]


def interleaved(rounds: int, *ways: Callable[[], float]) -> list[list[float]]:
    """Seconds of each way, round after round (A B A B …), so that a busy machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for found, way in zip(seconds, ways, strict=True):
            found.append(way())
    return seconds


def clocked(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@contextlib.contextmanager
def mini_base() -> Iterator[str]:
    """What to give as `base`: the embedded one; before it is built, its architecture at random.

    Speed does not depend on the values.
    """
    from diffward.models.mini import PIPELINE

    if (PIPELINE / "model_index.json").exists():
        yield "mini"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(_random_mini(Path(folder)))


def base_name(base: str) -> str:
    return "mini" if base == "mini" else "mini (random weights)"


def _random_mini(folder: Path) -> Path:
    import torch

    from diffward.models.mini.autoencoder import new_autoencoder
    from diffward.models.mini.build import save_pipeline
    from diffward.models.mini.diffusion import new_text_encoder, new_unet
    from diffward.models.mini.vocabulary import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizer", seed=0, captions=200)
    save_pipeline(
        new_autoencoder().eval(), new_unet().eval(), new_text_encoder(tokenizer).eval(), tokenizer,
        "epsilon", folder / "mini",
    )  # fmt: skip
    return folder / "mini"


def draw_folder(folder: Path, count: int, seed: Sequence[int], size: int = 64) -> Path:
    """A folder of `count` drawn pictures with captions."""
    from diffward.models.mini import world

    world.save_folder([world.sample([*seed, i], size=size) for i in range(count)], folder)
    return folder


FIGURES = (
    "auc", "auc_ci95", "auc_signfree", "p_value", "tpr_at_fpr", "n_members", "n_non_members",
    "queries_per_image",
)  # fmt: skip


def attack_rows(membership: Mapping[str, Any], **common: Any) -> list[dict[str, Any]]:
    """One row an attack of the `membership` part of an audit, with what the rows have in common."""
    rows = []
    for name, found in membership["attacks"].items():
        figures = {key: found[key] for key in FIGURES}
        figures["tpr_at_fpr"] = {k: v for k, v in found["tpr_at_fpr"].items() if v is not None}
        controls = {key: found["controls"][key] for key in ("base_model_auc", "blind_auc")}
        rows.append({**common, "attack": name, **figures, **controls})
    return rows
