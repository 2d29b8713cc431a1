"""Where a mask freezes: a picture of blocks against kinds of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffward.files import atomic_path
from diffward.guard.mask import FreezeMask

KINDS = (
    *(f"attn{i} {part}" for i in (1, 2) for part in ("q", "k", "v", "out")),
    "ff", "proj", "conv", "time", "norm", "bias", "other",
)  # fmt: skip
# One hue from nearly nothing to full: the share is a quantity. Where there is no tensor there is no cell.
_LOW, _HIGH, _INK, _PALE, _LINE = "#eef3fa", "#0b3d7a", "#222222", "#ffffff", "#d5d5d5"


def block_of(name: str) -> str:
    """The row of a parameter: `in`, `down.0` …, `mid`, `up.0` …, `out`."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.", name):
        return f"{match[1]}.{match[2]}"
    if name.startswith("mid_block."):
        return "mid"
    return "out" if name.startswith(("conv_norm_out.", "conv_out.")) else "in"


def kind_of(name: str) -> str:
    """The column of a parameter. Norms are one with their biases; all other biases are a column of their own."""
    if "norm" in name.rpartition(".")[0].split(".")[-1]:
        return "norm"
    if name.endswith(".bias"):
        return "bias"
    if match := re.search(r"\.attn([12])\.to_(q|k|v|out)\b", name):
        return f"attn{match[1]} {match[2]}"
    for kind, mark in (
        ("ff", r"\.ff\."), ("proj", r"\.proj_(in|out)\."), ("time", r"(^time_embedding|\.time_emb_proj)\."),
        ("conv", r"(^|\.)conv(\d|_in|_out|_shortcut)?\."),
    ):  # fmt: skip
        if re.search(mark, name):
            return kind
    return "other"


def rows_of(names: Iterable[str]) -> list[str]:
    """The blocks there are, in the order of execution."""

    def place(block: str) -> tuple[int, int]:
        stage, _, number = block.partition(".")
        return ("in", "down", "mid", "up", "out").index(stage), int(number or 0)

    return sorted({block_of(name) for name in names}, key=place)


def shares(mask: FreezeMask) -> tuple[list[str], list[str], np.ndarray]:
    """Rows R, columns C, and what is in each cell, row and column, and in all.

    Returns:
        blocks and kinds, each ending in "all", and counts (R, C, 4): tensors frozen, tensors, parameters
        frozen, parameters.
    """
    blocks = [*rows_of(mask.tensors), "all"]
    there = {kind_of(name) for name in mask.tensors}
    kinds = [*(kind for kind in KINDS if kind in there), "all"]
    counts = np.zeros((len(blocks), len(kinds), 4), dtype=np.int64)
    for name, entry in mask.tensors.items():
        told = np.array([entry.frozen, 1, entry.frozen * entry.numel, entry.numel])
        row, column = blocks.index(block_of(name)), kinds.index(kind_of(name))
        for r in (row, -1):
            for c in (column, -1):
                counts[r, c] += told
    return blocks, kinds, counts


def draw_mask(mask: FreezeMask, path: str | Path) -> None:
    """Write a PNG: colour is the frozen share of a cell's parameters; in it, how many tensors are frozen of how many."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    blocks, kinds, counts = shares(mask)
    colours = LinearSegmentedColormap.from_list("share", [_LOW, _HIGH])
    wide, tall = len(kinds), len(blocks)
    figure = Figure(figsize=(2.2 + 0.66 * wide, 1.9 + 0.36 * tall), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # The sums stand a little apart from what they sum.
    gap = 0.25
    xs = [x + gap * (x == wide - 1) for x in range(wide)]
    ys = [y + gap * (y == tall - 1) for y in range(tall)]
    for y, row in zip(ys, counts, strict=True):
        for x, (frozen, tensors, held, parameters) in zip(xs, row, strict=True):
            if not tensors:
                continue
            share = held / parameters
            axes.add_patch(
                Rectangle((x, y), 1, 1, facecolor=colours(share), edgecolor=_LINE, linewidth=0.6)
            )
            axes.text(
                x + 0.5, y + 0.5, f"{frozen}/{tensors}", ha="center", va="center", fontsize=7.5,
                color=_PALE if share > 0.5 else _INK,
            )  # fmt: skip
    axes.set(xlim=(0, wide + gap), ylim=(tall + gap, 0), aspect="auto")
    axes.set_xticks([x + 0.5 for x in xs], kinds, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks([y + 0.5 for y in ys], blocks)
    axes.tick_params(
        top=True,
        labeltop=True,
        bottom=False,
        labelbottom=False,
        length=0,
        labelsize=8.5,
        colors=_INK,
    )
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(mask.told(), fontsize=10, color=_INK, loc="left", pad=12)
    axes.set_xlabel("in a cell: tensors frozen / tensors", fontsize=8.5, color=_INK, loc="left")
    bar = figure.colorbar(ScalarMappable(cmap=colours), ax=axes, fraction=0.03, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"], fontsize=8, color=_INK)
    bar.set_label("parameters frozen", fontsize=8.5, color=_INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
