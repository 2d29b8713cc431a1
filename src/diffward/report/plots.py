"""Plots as inline SVG text: no script, no network, colours from the page's style sheet.

Hand-made rather than drawn by matplotlib: a tenth of the size, text that stays text, and colours
that follow the reader's light or dark setting through CSS classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

from diffward.membership.statistics import Scores, roc_curve

SERIES = 5


def roc_svg(curves: Mapping[str, tuple[Scores, Scores]]) -> Markup:
    """Log-log ROC of {attack: (members, non-members)}: the low-FPR corner is what matters."""
    width, height, left, bottom, top, right = 420, 400, 52, 344, 14, 16
    finest = min(1 / max(len(side) for side in pair) for pair in curves.values())
    floor = next(s for s in (0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4, 1e-5, 0.0) if s <= finest) or 1e-6

    def place(fpr: Scores, tpr: Scores) -> tuple[Scores, Scores]:
        share_x = 1 - np.log(np.maximum(fpr, floor)) / np.log(floor)
        share_y = 1 - np.log(np.maximum(tpr, floor)) / np.log(floor)
        return left + share_x * (width - left - right), bottom - share_y * (bottom - top)

    parts = []
    for tick in [t for t in (1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if t >= floor]:
        if floor < 0.01 and tick in (0.02, 0.05, 0.2, 0.5):
            continue
        (x,), (y,) = place(np.array([tick]), np.array([tick]))
        parts.append(f'<line class="grid" {_xy(x, top, x, bottom)}/>')
        parts.append(f'<line class="grid" {_xy(left, y, width - right, y)}/>')
        parts.append(_text(x, bottom + 18, f"{tick:.3g}".replace("1e-05", "1e-5"), "middle"))
        parts.append(_text(left - 8, y + 4, f"{tick:.3g}", "end"))
    parts.append(f'<line class="chance" {_xy(left, bottom, width - right, top)}/>')
    for index, (members, others) in enumerate(curves.values()):
        fpr, tpr = roc_curve(members, others)
        # Steps, and nothing below the axis: a curve is drawn from the first member it finds.
        fpr, tpr = np.repeat(fpr, 2)[1:], np.repeat(tpr, 2)[:-1]
        xs, ys = place(fpr[tpr > 0], tpr[tpr > 0])
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in _thin(xs, ys))
        parts.append(f'<polyline class="curve s{index % SERIES}" points="{points}"/>')
    middle = (left + width - right) / 2
    parts.append(_text(middle, bottom + 42, "other pictures wrongly named (FPR)", "middle"))
    parts.append(
        f'<text class="tick" text-anchor="middle" transform="translate(12 {(top + bottom) / 2}) '
        f'rotate(-90)">training pictures found (TPR)</text>'
    )
    names = ", ".join(curves)
    return _svg(width, height, f"ROC curves on logarithmic axes of {names}", parts)


def histogram_svg(members: Scores, others: Scores) -> Markup:
    """Shares of members (above the line) and non-members (below) by score; ticks: single pictures."""
    width, left, right, top, middle = 420, 12, 12, 30, 180
    low, high = float(min(members.min(), others.min())), float(max(members.max(), others.max()))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(np.sqrt(len(members) + len(others)) * 1.5, 8, 40))
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(side, edges)[0] / len(side) for side in (members, others)]
    scale = (middle - top - 10) / max(float(np.max(shares)), 1e-9)
    step = (width - left - right) / bins
    parts = []
    for index in range(bins):
        x = left + index * step
        for share, name, sign in ((shares[0][index], "m", -1), (shares[1][index], "n", 1)):
            tall = share * scale
            y = middle - tall if sign < 0 else middle
            parts.append(
                f'<rect class="{name}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{step - 1:.1f}" '
                f'height="{tall:.1f}"/>'
            )
    parts.append(f'<line class="axis" {_xy(left, middle, width - right, middle)}/>')
    foot = 2 * middle - top
    if len(members) + len(others) <= 300:
        span = width - left - right
        for side, name, y in ((members, "m", 12), (others, "n", foot + 6)):
            for score in side:
                x = left + (score - low) / (high - low) * span
                parts.append(f'<line class="rug {name}" {_xy(x, y, x, y + 8)}/>')
    parts.append(_text(left, foot + 32, "← looks like any other picture", "start"))
    parts.append(_text(width - right, foot + 32, "looks like training data →", "end"))
    label = (
        f"Scores of {len(members)} training pictures, median {np.median(members):.3g}, above; of "
        f"{len(others)} other pictures, median {np.median(others):.3g}, below"
    )
    return _svg(width, foot + 44, label, parts)


def _thin(xs: Scores, ys: Scores, limit: int = 1500) -> list[tuple[float, float]]:
    """Points that differ on the screen from the one before, at most `limit`."""
    pairs = np.round(np.stack([xs, ys], axis=1), 1)
    moved = np.any(np.diff(pairs, axis=0) != 0, axis=1)
    pairs = pairs[np.concatenate([[True], moved])]
    keep = np.linspace(0, len(pairs) - 1, min(limit, len(pairs))).astype(int)
    return [(float(x), float(y)) for x, y in pairs[keep]]


def _xy(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    body = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{body}</svg>"
    )
