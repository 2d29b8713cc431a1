"""The tables of bench/ that are cheap, in their quick form: they run and give the rows they promise."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 200


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`quick("bank_speed")`: the rows that a quick run hands to `record`."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)

    def run(name: str) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []

        def record(title: str, rows: list[dict[str, Any]], **options: Any) -> None:
            assert title == name.replace("_", "-")
            assert options["quick"] is True
            told.extend(rows)

        module = importlib.import_module(f"bench.{name}")
        monkeypatch.setattr(module, "record", record)
        module.run(quick=True)
        return told

    return run


@pytest.mark.slow
def test_inspect_speed(quick: Any) -> None:
    rows = quick("inspect_speed")  # seconds are for the table: a busy machine must not fail here
    assert [row["file"] for row in rows] == ["warm", "cold"]
    for row in rows:
        assert {"help_s", "inspect_s", "extra_s", "help_mb", "inspect_mb"} <= row.keys()
        assert row["file_mb"] > 1000
        assert 0 < row["help_mb"] < row["inspect_mb"] < LIMIT_MB


@pytest.mark.slow
def test_bank_speed(quick: Any) -> None:
    row, suite = quick("bank_speed")
    assert suite["evaluation_ratio"] <= 0.4
    assert {"base", "pictures", "pairs", "cold_s", "one_by_one_s", "ratio"} <= row.keys()
    assert row["difference"] < 1e-3  # both ways measure the same
    assert row["again_s"] < row["cold_s"] < row["one_by_one_s"]


@pytest.mark.slow
def test_membership(quick: Any) -> None:
    rows = quick("membership")
    assert {row["captions"] for row in rows} == {"known", "unknown"}
    assert {"loss", "gsa1", "clid", "lira", "rmia", "secmi_nn", "mlp", "blackbox"} <= {
        row["attack"] for row in rows
    }
    keys = "dataset base exposure rank seed captions attack auc auc_ci95 auc_signfree tpr_at_fpr "
    keys += "base_model_auc blind_auc n_members n_non_members"
    assert all(set(keys.split()) <= row.keys() for row in rows)


@pytest.mark.slow
def test_never_trained(quick: Any) -> None:
    (row,) = quick("never_trained")
    assert row["none_shown"] + row["refused"] >= 0.8  # ten splits; the table has 100


@pytest.mark.slow
def test_leak_by_layer(quick: Any) -> None:
    rows = quick("leak_by_layer")
    whole = [row for row in rows if row["layers"] == "all"]
    parts = [row for row in rows if row["layers"] != "all" and row["direction"] == "mean"]
    assert sum(row["parameters"] for row in parts) == whole[0]["parameters"]  # each weight once
    assert whole[0]["gain"] == pytest.approx(1.0)
    assert all(row["auc_ci95"][0] <= row["auc"] <= row["auc_ci95"][1] for row in rows)


@pytest.mark.slow
def test_private_lora(quick: Any) -> None:
    rows = quick("private_lora")
    cases = [row for row in rows if "attacks" in row]
    costs = [row for row in rows if "attacks" not in row]
    assert [(row["method"], row["exposure"]) for row in cases] == [
        ("plain", 1), ("plain", 2), ("smp", 2), ("distill", 2),
    ]  # fmt: skip
    keys = "method settings exposure dataset seed heldout_loss_ratio kid kid_ci95 identity_match attacks"
    for row in cases:
        assert set(keys.split()) <= row.keys()
        assert {"calibrated", "adaptive", "gsa1", "clid"} <= row["attacks"].keys()
        assert row["worst_auc"] == max(row["attacks"].values()) >= 0.5
    best = min(cases[:2], key=lambda row: row["heldout_loss_ratio"])
    assert 1.0 in [row["heldout_loss_ratio"] for row in cases[:2]]
    assert best["gain_kept"] is None or best["gain_kept"] >= 1
    assert [row["method"] for row in costs] == ["plain", "smp", "distill"]
    for row in costs:
        assert {"base", "step_ratio", "memory_ratio", "seconds", "total_ratio"} <= row.keys()
        assert (row["step_ratio"] == 1) == (row["method"] == "plain")


@pytest.mark.slow
def test_many_loras(quick: Any) -> None:
    for row in quick("many_loras"):
        assert {"k", "device", "base", "ratio"} <= row.keys()
        assert row["difference"] < 1e-3  # both ways train the same LoRAs


@pytest.mark.slow
def test_train_step(quick: Any) -> None:
    (row,) = quick("train_step")
    assert {
        "base",
        "batch",
        "rank",
        "ours_s",
        "loop_s",
        "ratio",
        "ours_mb",
        "loop_mb",
    } <= row.keys()
    assert 0 < row["ours_s"] < row["loop_s"]
    assert row["neither_mb"] <= row["ours_mb"] * 1.02


def test_ours_and_the_loop_start_alike(
    monkeypatch: pytest.MonkeyPatch, denoiser: Any, pictures: Any
) -> None:
    """Neither way leaves anything on the base: the rounds are independent of one another."""
    import torch

    monkeypatch.syspath_prepend(str(ROOT))
    train_step = importlib.import_module("bench.train_step")
    monkeypatch.setattr(train_step, "BATCH", 2)
    before = {k: v.clone() for k, v in denoiser.unet.state_dict().items()}
    assert len(train_step.Loop(denoiser, pictures)(2)) == 2
    assert len(train_step._ours(denoiser, pictures)(2)) == 2
    after = denoiser.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not any(p.requires_grad for p in denoiser.unet.parameters())


@pytest.mark.slow
def test_weight_inversion(quick: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bench.weight_inversion as bench

    monkeypatch.setattr(bench, "RUNS", tmp_path)
    rows = quick("weight_inversion")
    assert {row["part"] for row in rows} == {
        "readers", "sets", "probes", "gate", "nobody", "decoders", "read-words", "words", "ablations", "generalisation", "matching", "defences"
    }  # fmt: skip
    needed = {
        "method", "decoder", "control", "victims", "gallery", "top1", "top1_ci95", "top10", "attribute_accuracy",
        "timestep_embedding", "defence", "utility", "seed",
    }  # fmt: skip
    whole = [row for row in rows if needed <= row.keys()]
    assert {row["control"] for row in whole} >= {
        "own",
        "shuffled",
        "other",
        "mean",
        "class prompt",
        "null prompt",
    }
    assert {row["decoder"] for row in whole} >= {"retrieval", "base", "latent", "victim", "guided"}
    assert {row["defence"] for row in whole} >= {
        "none",
        "dp, epsilon 10, delta 0.01",
        "quantised to 4 bits",
    }
    assert all(0 <= row["top1"] <= row["top10"] <= 1 for row in whole)


@pytest.mark.slow
def test_zoo_cost(quick: Any) -> None:
    count, tier = quick("zoo_cost")
    assert count["public_gflop"] > 3 * count["ours_gflop"] > 0
    assert "identity" in tier["what"] and tier["seconds"] > 0


def test_a_process_is_measured_apart_from_its_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    support = importlib.import_module("bench._support")
    ballast = bytearray(300_000_000)
    small = support.measure([sys.executable, "-c", "print('here')"])
    large = support.measure([sys.executable, "-c", "x = b'1' * 150_000_000"])
    assert len(ballast) == 300_000_000
    assert small.output == "here\n"
    assert small.peak_mb < 60 < 150 < large.peak_mb < 250
    with pytest.raises(RuntimeError, match="ended with 3"):
        support.measure([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_large_lora_is_a_valid_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffward.lora import inspect_lora

    monkeypatch.syspath_prepend(str(ROOT))
    write = importlib.import_module("bench.inspect_speed").write_large_lora
    size = write(tmp_path / "small.safetensors", rank=1)
    found = inspect_lora(tmp_path / "small.safetensors")
    assert found.bytes == size
    assert (found.modules, found.rank, found.base_family) == (494, 1, "flux")
    assert [leak.key for leak in found.leaks] == ["ss_tag_frequency"]
