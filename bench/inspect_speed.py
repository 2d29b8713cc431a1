"""What `diffward inspect` costs on a LoRA of 1 GiB: seconds more than `--help`, resident memory."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench._result import record
from bench._support import Measured, diffward, measure

SEED = 0
RANK = 100  # 1.07 GB


def run(quick: bool = False) -> None:
    rounds = 3 if quick else 9
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"
        size = write_large_lora(path)
        rows = [compare(path, size, rounds, cold) for cold in (False, True)]
    record("inspect-speed", rows, seeds=[SEED], quick=quick, notes=[
        "a LoRA of rank 100 on all linear layers of FLUX (494 modules, fp16), with kohya's tag frequencies "
        "in its header; whole processes, --help and inspect in turns; medians",
        "extra_s: median over the rounds of inspect minus --help; claimed: < 1 s and < 200 MB",
        "file cold: the kernel is told to forget the file before each run",
    ])  # fmt: skip


def compare(path: Path, size: int, rounds: int, cold: bool) -> dict[str, Any]:
    helps: list[Measured] = []
    inspections: list[Measured] = []
    measure(diffward("--help"))
    measure(diffward("inspect", path))
    for _ in range(rounds):
        helps.append(measure(diffward("--help")))
        if cold:
            _forget(path)
        inspections.append(measure(diffward("inspect", path)))
    return {
        "file": "cold" if cold else "warm",
        "file_mb": size / 1e6,
        "rounds": rounds,
        "help_s": median(m.seconds for m in helps),
        "inspect_s": median(m.seconds for m in inspections),
        "extra_s": median(i.seconds - h.seconds for h, i in zip(helps, inspections, strict=True)),
        "help_mb": median(m.peak_mb for m in helps),
        "inspect_mb": max(m.peak_mb for m in inspections),
    }


def flux_layers() -> Iterator[tuple[str, int, int]]:
    """(name, inputs, outputs) of the linear layers in FLUX.1's transformer blocks."""
    width = 3072
    for n in range(19):
        block = f"transformer_blocks.{n}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):  # fmt: skip
            yield f"{block}.attn.{name}", width, width
        for name in ("ff", "ff_context"):
            yield f"{block}.{name}.net.0.proj", width, 4 * width
            yield f"{block}.{name}.net.2", 4 * width, width
        for name in ("norm1", "norm1_context"):
            yield f"{block}.{name}.linear", width, 6 * width
    for n in range(38):
        block = f"single_transformer_blocks.{n}"
        for name in ("to_q", "to_k", "to_v"):
            yield f"{block}.attn.{name}", width, width
        yield f"{block}.proj_mlp", width, 4 * width
        yield f"{block}.proj_out", 5 * width, width
        yield f"{block}.norm.linear", width, 3 * width


def write_large_lora(path: Path, rank: int = RANK) -> int:
    """Write the file block by block, no tensor in memory; returns its size in bytes."""
    tags = {"10_sks": {f"tag {i}": i + 1 for i in range(500)}}
    header: dict[str, Any] = {"__metadata__": {"ss_tag_frequency": json.dumps(tags)}}
    offset = 0
    for name, inputs, outputs in flux_layers():
        for factor, shape in (("lora_A", [rank, inputs]), ("lora_B", [outputs, rank])):
            end = offset + 2 * shape[0] * shape[1]
            header[f"transformer.{name}.{factor}.weight"] = {
                "dtype": "F16", "shape": shape, "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(SEED).standard_normal(1 << 22, dtype=np.float32) * 0.01
    block = noise.astype("<f2").tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, len(block)):
            file.write(block[: min(len(block), offset - start)])
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def _forget(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
