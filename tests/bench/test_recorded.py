"""Rows of an earlier table: kept, replaced, or dropped with what they were made of."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = ("method", "seed")


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("bench._result")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    rows = [{"method": m, "seed": s, "auc": a} for m, s, a in (
        ("plain", 0, 0.9), ("plain", 1, 0.8), ("plain", "all", 0.85), ("smp", 0, 0.7),
    )]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps({"commit": "abc", "rows": rows}))
    return module


def test_what_is_not_measured_again_stays_and_says_from_when(result: Any) -> None:
    new = {"method": "dp", "seed": 0, "auc": 0.5}
    rows = result.with_recorded("t", [new], KEY)
    assert [(r["method"], r["seed"], r.get("commit")) for r in rows] == [
        ("plain", 0, "abc"), ("plain", 1, "abc"), ("plain", "all", "abc"), ("smp", 0, "abc"), ("dp", 0, None),
    ]  # fmt: skip
    assert result.with_recorded("none", [new], KEY) == [new]


@pytest.mark.parametrize(("auc", "stays"), [(0.9, True), (0.9004, True), (0.7, False)])
def test_a_mean_goes_when_one_of_its_seeds_came_out_otherwise(
    result: Any, auc: float, stays: bool
) -> None:
    rows = result.with_recorded("t", [{"method": "plain", "seed": 0, "auc": auc}], KEY)
    told = [(r["method"], r["seed"], r["auc"]) for r in rows]
    assert (("plain", "all", 0.85) in told) == stays
    assert told.count(("plain", 0, auc)) == 1 and ("plain", 1, 0.8) in told
    assert sum(r["seed"] == 0 and r["method"] == "plain" for r in rows) == 1
