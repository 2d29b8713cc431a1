"""The whole way at the size of the real Stable Diffusion 1.5: train, audit, convert there and back.

Each stage is the command itself in a process of its own. The weights are random (bench.make_sd15):
this shows what runs and what it costs, not what an attack finds. `DIFFWARD_SD15` names a folder made
before; else one is made (2.1 GB in the temporary folder).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench._result import record
from bench._support import Measured, diffward, draw_folder, measure

SEED = 0
STEPS, RANK, ALPHA = 3, 4, 8
FEW = "loss,calibrated"
WEIGHTS = "pytorch_lora_weights.safetensors"


def run(quick: bool = False) -> None:
    rows: list[dict[str, Any]] = []
    # At full resolution a pass takes seconds on a processor: there the two attacks that ask least.
    plans = [(128, FEW)] if quick else [(128, "standard"), (512, FEW)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = _base(folder, rows)
        for resolution, attacks in plans:
            here = folder / str(resolution)
            pictures = draw_folder(here / "members", 2, [SEED, 9], size=resolution)
            others = draw_folder(here / "others", 2, [SEED, 10], size=resolution)
            for prediction in ("epsilon", "v_prediction"):
                chosen = _with_prediction(base, prediction, here / prediction)
                rows += stages(chosen, prediction, pictures, others, here / "out" / prediction, resolution, attacks)  # fmt: skip
    record("real-size", rows, seeds=[SEED], quick=quick, notes=[
        f"the architecture of Stable Diffusion 1.5 at full size, random weights; LoRA rank {RANK}, alpha {ALPHA}, "
        f"batch 1, {STEPS} steps; audit of 2 members and 2 others",
        "seconds and peak resident memory of the whole process, the loading of the base included",
        "train: the LoRA moved away from zero; audit: every attack gave finite figures; at 128 pixels the standard suite, at 512 loss and calibrated; back: tensors bit for bit "
        "those before kohya, alphas equal; any other outcome stops the benchmark",
    ])  # fmt: skip


def stages(
    base: Path,
    prediction: str,
    members: Path,
    others: Path,
    out: Path,
    resolution: int,
    attacks: str,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    env = {"DIFFWARD_CACHE": str(out / "cache"), "HF_HUB_OFFLINE": "1"}

    def stage(name: str, *arguments: str | Path) -> Measured:
        done = measure(diffward(*arguments), env)
        rows.append({
            "prediction": prediction, "resolution": resolution, "stage": name,
            "seconds": done.seconds, "peak_mb": done.peak_mb,
        })  # fmt: skip
        print(f"{prediction}, {resolution} px, {name}: {done.seconds:.1f} s, {done.peak_mb:.0f} MB")
        return done

    common = ["--base", base, "--resolution", str(resolution), "--device", "cpu"]
    stage(
        "train", "train", members, *common, "--steps", str(STEPS), "--batch", "1", "--rank", str(RANK),
        "--alpha", str(ALPHA), "--seed", str(SEED), "--out", out / "train",
    )  # fmt: skip
    lora = out / "train" / WEIGHTS
    _assert_trained(lora)
    stage(
        "audit", "audit", lora, *common, "--members", members, "--non-members", others,
        "--pairs", "2", "--batch", "4", "--attacks", attacks, "--out", out / "audit",
    )  # fmt: skip
    _assert_audited(out / "audit" / "report.json")
    kohya, back = out / "kohya.safetensors", out / "back.safetensors"
    stage("to kohya", "convert", lora, "--to", "kohya", "--out", kohya)
    stage("back", "convert", kohya, "--to", "diffusers", "--out", back)
    _assert_same(lora, back)
    return rows


def _base(folder: Path, rows: list[dict[str, Any]]) -> Path:
    given = os.environ.get("DIFFWARD_SD15")
    if given:
        return Path(given)
    done = measure([sys.executable, "-m", "bench.make_sd15", folder / "base"])
    print(f"base made: {done.seconds:.1f} s, {done.peak_mb:.0f} MB")
    rows.append({"stage": "make the base", "seconds": done.seconds, "peak_mb": done.peak_mb})
    return folder / "base"


def _with_prediction(base: Path, prediction: str, out: Path) -> Path:
    """The same weights (linked, not copied) with another kind of prediction in the scheduler's file."""
    shutil.copytree(base, out, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve()))
    config = out / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text()) | {"prediction_type": prediction}
    config.unlink()
    config.write_text(json.dumps(settings, indent=2) + "\n")
    return out


def _assert_trained(path: Path) -> None:
    from safetensors.numpy import load_file

    ups = [v for k, v in load_file(path).items() if ".lora_B." in k]
    assert len(ups) == 128, f"{len(ups)} modules; 16 blocks of 2 attentions of 4 layers are 128"
    assert all(v.any() for v in ups), "a lora_B is zero after training"


def _assert_audited(path: Path) -> None:
    report = json.loads(path.read_text())
    assert report["subject"]["base_family"] == "sd1", report["subject"]["base_family"]
    assert {"loss", "calibrated"} <= report["membership"]["attacks"].keys()
    for name, figures in report["membership"]["attacks"].items():
        assert 0 <= figures["auc"] <= 1, f"{name}: AUC {figures['auc']}"
        assert figures["n_members"] == figures["n_non_members"] == 2


def _assert_same(before: Path, after: Path) -> None:
    from safetensors.numpy import load_file

    from diffward.lora import open_lora

    old, new = load_file(before), load_file(after)
    assert old.keys() == new.keys(), sorted(old.keys() ^ new.keys())[:4]
    for key, value in old.items():
        assert value.dtype == new[key].dtype, key
        assert value.tobytes() == new[key].tobytes(), key
    alphas = [
        {name: entry.alpha() for name, entry in open_lora(path).entries.items()}
        for path in (before, after)
    ]
    assert alphas[0] == alphas[1] and set(alphas[0].values()) == {float(ALPHA)}
