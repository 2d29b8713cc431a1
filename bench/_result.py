"""Writes a table: `results/NAME.json` (schema diffward.bench/1) and a Markdown table beside it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffward.files import write_json, write_text
from diffward.provenance import hardware, versions

RESULTS = Path(__file__).parent / "results"


def record(
    name: str, rows: Sequence[Mapping[str, Any]], *, seeds: Sequence[int] = (), notes: Sequence[str] = (),
    quick: bool = False, device: str = "cpu",
) -> None:  # fmt: skip
    """Print the table and, unless `quick`, write it to `bench/results`."""
    table = markdown(rows)
    print(f"\n{name}\n{table}")
    if quick:
        return
    data = {
        "schema": "diffward.bench/1",
        "name": name,
        "command": f"diffward bench {name}",
        "commit": _commit(),
        "machine": {**hardware(device), "cpu": _cpu()},
        "versions": versions(),
        "seeds": list(seeds),
        "notes": list(notes),
        "rows": list(rows),
    }
    write_json(RESULTS / f"{name}.json", data)
    lines = [
        f"# {name}",
        "",
        f"`{data['command']}`, commit {data['commit']}, {_cpu()}, {os.cpu_count()} cores.",
        "",
    ]
    write_text(
        RESULTS / f"{name}.md", "\n".join([*lines, table, "", *(f"- {n}" for n in notes), ""])
    )
    print(f"wrote {RESULTS / name}.json")


def with_recorded(
    name: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]
) -> list[dict[str, Any]]:
    """`rows`, after those of the recorded table that they do not replace.

    A recorded mean over seeds (`seed` is "all") stays as long as none of its seeds came out otherwise now. Rows that
    stay get a column `commit`: that of the table in which they were first told.

    Args:
        key: the columns that tell rows apart, `seed` among them.
    """
    told = _recorded(name)

    def about(row: Mapping[str, Any], without: str = "") -> tuple[Any, ...]:
        return tuple(row.get(column) for column in key if column != without)

    new = {about(row): row for row in rows}
    changed = {
        about(row, "seed") for row in told["rows"] if about(row) in new and not _alike(row, new[about(row)])
    }  # fmt: skip
    kept = [
        {"commit": told["commit"], **row} for row in told["rows"]
        if about(row) not in new and not (row.get("seed") == "all" and about(row, "seed") in changed)
    ]  # fmt: skip
    return [*kept, *(dict(row) for row in rows)]


def recorded_rows(name: str) -> list[dict[str, Any]]:
    """Rows of the recorded table; none where there is no table."""
    return list(_recorded(name)["rows"])


def _recorded(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return {"commit": None, "rows": []}
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _alike(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float = 1e-3) -> bool:
    """Whether the numbers that both tell are the same."""
    return all(
        abs(value - new[column]) <= tolerance * max(1.0, abs(value))
        for column, value in old.items()
        if isinstance(value, float) and isinstance(new.get(column), float)
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return "\n".join(
        [*lines, *("| " + " | ".join(_cell(row.get(k)) for k in keys) + " |" for row in rows)]
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return " to ".join(_cell(v) for v in value)
    return "" if value is None else str(value)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "src", "bench"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout.strip() or "none") + ("+" if dirty.stdout.strip() else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown processor"
