"""`diffward guard learn` as a whole run: what is refused before any work, and what a run makes again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.guarding import TINY, draw, one_line, run


@pytest.fixture(scope="module")
def forbidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("domain") / "forbidden", 4, seed=1)


def test_a_guard_of_one_domain_asks_for_no_other(
    forbidden: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "guard", "learn", "--method", "imma", "--illegal", forbidden, "--base", base_folder, "--imma.steps", 2, *TINY,
        "--out", tmp_path / "out",
    ]  # fmt: skip
    code, _, err = run(capsys, *line)
    assert code == 0, err
    assert (tmp_path / "out" / "edit.safetensors").exists()
    line[line.index("--illegal") + 1] = ""
    assert "--illegal is missing" in one_line(capsys, *line)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--budget", "1e-7"], "--budget 1e-07: would freeze no tensor"),
        (["--by", "tensors", "--budget", "0.9999"], "--budget 0.9999: would freeze every tensor"),
        (["--paper", "true", "--illegal-weight", "5"], "--illegal-weight 5.0: guard freeze does not look at it"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    learning: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str
) -> None:  # fmt: skip
    line = [*learning, *given, "--out", tmp_path / "out"]
    assert says in one_line(capsys, *line)
    assert not (tmp_path / "out").exists()


def test_an_artefact_that_was_taken_away_is_made_again(
    learning: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = tmp_path / "out" / "mask.json"
    line = [*learning, "--out", mask.parent]
    assert run(capsys, *line)[0] == 0
    before = mask.read_bytes()
    assert "user_optimizer" in json.loads(before)["settings"]
    mask.unlink()
    code, said, err = run(capsys, *line)
    assert code == 0 and f"wrote {mask}" in said, err
    assert mask.read_bytes() == before


def test_a_rate_that_is_too_high_is_called_by_its_own_name(
    learning: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*learning, "--tune-steps", 8, "--user-lr", "1e8", "--out", tmp_path / "out"]
    code, _, err = run(capsys, *line)
    assert code != 0 and "lower --user-lr" in err and "--lr," not in err and "Traceback" not in err
