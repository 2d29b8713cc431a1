"""The main job on the embedded base: train, audit, read the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffward.commands.main import main
from diffward.models.mini import world
from diffward.models.mini.attributes import Person
from diffward.report.schema import validate_report

WEIGHTS = "pytorch_lora_weights.safetensors"


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return int(stop.value.code or 0)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFWARD_CACHE", str(tmp_path / "cache"))
    person = Person.random(np.random.default_rng(5))
    world.save_folder(world.portraits(person, 24, 11, name="sks"), tmp_path / "pictures")
    return tmp_path / "pictures"


def test_train_and_audit(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = [
        "train",
        pictures,
        "--holdout",
        "0.5",
        "--steps",
        "6",
        "--sample-every",
        "3",
        "--out",
        out,
    ]
    assert run(*train) == 0
    left = {p.name for p in out.iterdir()}
    assert {
        WEIGHTS,
        "config.yaml",
        "run.json",
        "split.json",
        "samples.png",
        "checkpoint.pt",
    } <= left
    before = (out / WEIGHTS).read_bytes()
    assert run(*train) == 0  # already finished
    assert (out / WEIGHTS).read_bytes() == before
    assert run("train", "--config", out / "config.yaml", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == before
    assert (
        b"sks" not in before and b"pictures" not in before
    )  # nothing of the data in the model file

    audit = [
        "audit",
        out / WEIGHTS,
        "--data",
        pictures,
        "--split",
        out / "split.json",
        "--out",
        tmp_path / "audit",
    ]
    assert run(*audit) == 0
    report = json.loads((tmp_path / "audit" / "report.json").read_text())
    assert validate_report(report) == []
    assert {"calibrated", "clid", "gsa1", "adaptive"} < set(report["membership"]["attacks"])
    assert set(report["membership"]["skipped"]) == {"lira", "lira_offline", "rmia"}
    assert report["membership"]["exposure"]["source"] == "run.json"
    made = report["membership"]["evaluations_per_image"]
    assert made["made"] <= 0.4 * made["one_by_one"]
    rows = (tmp_path / "audit" / "scores.csv").read_text().splitlines()
    assert len(rows) == 25
    asked = [q["id"] for q in report["questions"]]
    assert asked == ["metadata", "membership", "identity", "dataset_size", "prompt", "copies"]
    assert "<html" in (tmp_path / "audit" / "report.html").read_text()
    assert run(*audit, "--fail-above", "auc=0.5") == 1


def test_a_lora_that_was_never_trained_shows_nothing(pictures: Path, tmp_path: Path) -> None:
    import torch

    from diffward.lora import LoraModule, LoraWeights, open_lora, write_lora

    assert (
        run("train", pictures, "--holdout", "0.5", "--steps", "1", "--out", tmp_path / "run") == 0
    )
    weights = open_lora(tmp_path / "run" / WEIGHTS).load()
    zero = {
        n: LoraModule.of(n, m.tensors["down"], torch.zeros_like(m.tensors["up"]), m.alpha)
        for n, m in weights.modules.items()
    }
    write_lora(LoraWeights(zero), tmp_path / "zero.safetensors", "kohya")
    split = tmp_path / "run" / "split.json"
    assert (
        run(
            "audit",
            tmp_path / "zero.safetensors",
            "--data",
            pictures,
            "--split",
            split,
            "--out",
            tmp_path / "a",
        )
        == 0
    )
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["membership"]["attacks"]["calibrated"]["auc"] == 0.5
    for ident in ("membership", "identity", "prompt", "copies"):
        assert next(q for q in report["questions"] if q["id"] == ident)["level"] == "none_shown"
    assert "What the weights show" not in (tmp_path / "a" / "report.html").read_text()


def test_canaries_shadows_and_unknown_captions(pictures: Path, tmp_path: Path) -> None:
    split, out = tmp_path / "coins.json", tmp_path / "run"
    assert run("split", pictures, "--out", split, "--canaries", "--seed", "3") == 0
    assert run("train", pictures, "--split", split, "--steps", "4", "--out", out) == 0
    audit = ["audit", out / WEIGHTS, "--data", pictures, "--split", split, "--out", tmp_path / "a"]
    wanted = ["--attacks", "loss_mc,lira,lira_offline,rmia,clid", "--captions", "unknown"]
    more = ["--canaries", "--shadows", "4", "--shadow-epochs", "1"]
    assert run(*audit, *wanted, *more) == 0
    found = json.loads((tmp_path / "a" / "report.json").read_text())["membership"]
    assert set(found["attacks"]) == {"loss_mc", "lira", "lira_offline", "rmia", "calibrated"}
    assert found["captions"] == "unknown" and "captions" in found["skipped"]["clid"]
    assert found["epsilon"]["attack"] == "calibrated" and found["epsilon"]["canaries"] == 23
    assert len(list((tmp_path / "a" / "shadows").glob("*.safetensors"))) == 4


def test_epsilon_wants_coins(pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert run("train", pictures, "--holdout", "0.5", "--steps", "1", "--out", out) == 0
    audit = ["audit", out / WEIGHTS, "--data", pictures, "--split", out / "split.json"]
    assert run(*audit, "--canaries", "--out", tmp_path / "a") == 2
    assert "diffward split --canaries" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_sides_that_differ_by_themselves_are_refused(pictures: Path, tmp_path: Path) -> None:
    from PIL import Image

    from diffward.models.mini import world

    world.save_folder([world.sample([7, i], domain="portrait") for i in range(48)], tmp_path / "p")
    for number in range(48):
        picture = Image.open(tmp_path / "p" / f"{number:05d}.png")
        folder = tmp_path / ("in" if number % 2 else "out")
        folder.mkdir(exist_ok=True)
        # The same pictures, but one side was saved harder.
        picture.save(folder / f"{number}.jpg", quality=95 if number % 2 else 20)
    assert run("train", tmp_path / "in", "--steps", "1", "--out", tmp_path / "run") == 0
    audit = ["audit", tmp_path / "run" / WEIGHTS, "--members", tmp_path / "in"]
    audit += ["--non-members", tmp_path / "out", "--attacks", "loss_mc,calibrated"]
    assert run(*audit, "--out", tmp_path / "a") == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    question = next(q for q in report["questions"] if q["id"] == "membership")
    assert question["claim"] == "refused" and question["level"] is None
    assert "control" in report["overall"]["headline"]


@pytest.mark.slow
def test_memorising_is_caught(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert (
        run("train", pictures, "--holdout", "0.5", "--epochs", "150", "--lr", "2e-3", "--out", out)
        == 0
    )
    audit = [
        "audit",
        out / WEIGHTS,
        "--data",
        pictures,
        "--split",
        out / "split.json",
        "--out",
        tmp_path / "a",
    ]
    assert run(*audit, "--fail-above", "auc=0.6") == 1
    attacks = json.loads((tmp_path / "a" / "report.json").read_text())["membership"]["attacks"]
    assert attacks["calibrated"]["auc"] >= 0.9
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert next(q for q in report["questions"] if q["id"] == "identity")["level"] == "high"
    assert "What the weights show" in (tmp_path / "a" / "report.html").read_text()
    assert (
        run("audit", out / WEIGHTS, "--out", tmp_path / "b") == 0
    )  # nobody's pictures: no pictures
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert [q["id"] for q in report["questions"]] == ["metadata", "identity", "dataset_size"]
    assert "data:image" not in (tmp_path / "b" / "report.html").read_text()
    assert (
        attacks["calibrated"]["controls"]["base_model_ok"]
        and attacks["calibrated"]["controls"]["blind_ok"]
    )


@pytest.mark.slow
def test_canaries_stay_below_the_bound_of_dp(tmp_path: Path) -> None:
    """The same audit refutes so small an epsilon for a LoRA that memorised, and not for the one made with it."""
    epsilon = 0.5
    drawn = [world.sample([71, i], domain="portrait") for i in range(60)]
    world.save_folder(drawn, tmp_path / "p")
    split = tmp_path / "coins.json"
    assert run("split", tmp_path / "p", "--out", split, "--canaries") == 0
    bounds = {}
    for name, options in {
        "memorised": ["--epochs", "60", "--lr", "2e-3"],
        "dp": ["--epochs", "10", "--method", "dp", "--dp.epsilon", epsilon],
    }.items():
        out = tmp_path / name
        assert run("train", tmp_path / "p", "--split", split, "--out", out, *options) == 0
        audit = ["audit", out / WEIGHTS, "--data", tmp_path / "p", "--split", split]
        attacks = ["--attacks", "calibrated", "--canaries", "--out", out / "a"]
        assert run(*audit, *attacks) == 0
        found = json.loads((out / "a" / "report.json").read_text())["membership"]
        bounds[name] = found["epsilon"]["epsilon"]
    told = json.loads((tmp_path / "dp" / "run.json").read_text())["facts"]
    assert float(told["ss_privacy_epsilon"]) <= epsilon
    assert bounds["dp"] <= epsilon < bounds["memorised"]


def test_a_vain_option_is_refused_before_class_pictures_are_drawn(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    prior = ["--prior-prompt", "a portrait", "--prior-count", "2"]
    assert run("train", pictures, "--method", "smp", "--dp.epsilon", "8", *prior, "--out", out) == 2
    assert "--dp.epsilon 8.0: method smp does not look at it" in capsys.readouterr().err
    assert not out.exists()
