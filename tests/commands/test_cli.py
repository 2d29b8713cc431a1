"""The command line: what it says, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffward.commands.main import COMMANDS, main
from diffward.lora import LoraModule, LoraWeights, write_lora


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def draw(folder: Path, n: int, seed: int = 0, size: int = 48) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        block = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(block).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"{i}.png"
        )
    return folder


def lora(
    path: Path, width: int = 128, inner: int = 96, name: str = "attn2.to_k", nan: bool = False
) -> Path:
    down, up = torch.randn(4, width), torch.randn(inner, 4)
    if nan:
        up[0, 0] = float("nan")
    module = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.{name}"
    write_lora(LoraWeights({module: LoraModule.of(module, down, up, 4.0)}), path, "diffusers")
    return path


def test_help_is_light() -> None:
    code = (
        "import sys\n"
        "from diffward.commands.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'jsonargparse'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_inspect_needs_no_torch(tmp_path: Path) -> None:
    file = lora(tmp_path / "a.safetensors")
    code = (
        "import sys\nfrom diffward.commands.main import main\n"
        f"try: main(['inspect', {str(file)!r}, '--json'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {"format", "base_family", "rank", "modules", "parameters", "leaks"} <= told.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and f"diffward {name}" in out


BAD = {
    "no such command": lambda t: ["frobnicate"],
    "unknown option": lambda t: ["inspect", lora(t / "a.safetensors"), "--colour", "red"],
    "wrong type": lambda t: ["train", draw(t / "p", 3), "--lr", "fast"],
    "bad setting": lambda t: ["train", draw(t / "p", 3), "--schedule", "wavy"],
    "unknown method": lambda t: ["train", draw(t / "p", 3), "--method", "magic", "--out", t / "out"],
    "missing file": lambda t: ["audit", t / "none.safetensors"],
    "truncated": lambda t: ["audit", cut(lora(t / "a.safetensors"))],
    "nan tensor": lambda t: ["inspect", lora(t / "a.safetensors", nan=True)],
    "other base": lambda t: [
        "audit", lora(t / "a.safetensors", width=2048, inner=640), "--members", draw(t / "m", 3, 1),
        "--non-members", draw(t / "n", 3, 2), "--out", t / "out",
    ],
    "half the pictures": lambda t: ["audit", lora(t / "a.safetensors"), "--members", draw(t / "m", 3)],
    "empty folder": lambda t: ["train", empty(t / "p"), "--out", t / "out"],
    "one picture a side": lambda t: [
        "audit", lora(t / "a.safetensors"), "--members", draw(t / "m", 1, 1), "--non-members", draw(t / "n", 1, 2),
        "--out", t / "out",
    ],
    "one picture to split": lambda t: ["split", draw(t / "p", 1), "--out", t / "s.json"],
    "both sides": lambda t: [
        "audit", lora(t / "a.safetensors"), "--members", draw(t / "m", 3, 1), "--non-members", draw(t / "n", 3, 1),
        "--out", t / "out",
    ],
    "no such base": lambda t: ["train", draw(t / "p", 3), "--base", t / "nowhere", "--out", t / "out"],
    "no network": lambda t: ["train", draw(t / "p", 3), "--base", "some-body/some-model", "--out", t / "out"],
    "bad gate": lambda t: ["audit", lora(t / "a.safetensors"), "--fail-above", "vibes=3"],
    "no out": lambda t: ["scrub", lora(t / "a.safetensors")],
    "bad config": lambda t: ["train", draw(t / "p", 3), "--config", wrong_yaml(t / "c.yaml")],
}  # fmt: skip


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def wrong_yaml(path: Path) -> Path:
    path.write_text("learning_rate_of_dreams: 3\n")
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_two(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    args = BAD[case](tmp_path)
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    code, _, err = run(capsys, *args)
    assert code == 2
    lines = [line for line in err.strip().splitlines() if line.startswith("diffward")]
    assert len(lines) == 1 and "Traceback" not in err, err
    left = {p for p in tmp_path.rglob("*") if "cache" not in p.parts} - before
    assert not [p for p in left if p.suffix in (".safetensors", ".html", ".json")], left


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (flag,))  # type: ignore[return-value]

    torch.save([Payload()], tmp_path / "bad.pt")
    code, _, err = run(capsys, "inspect", tmp_path / "bad.pt")
    assert code == 2 and err.count("\n") == 1
    assert not flag.exists()


def test_scrub_and_convert_write_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lora(tmp_path / "a.safetensors")
    assert (
        run(capsys, "convert", file, "--to", "kohya", "--out", tmp_path / "k.safetensors")[0] == 0
    )
    assert (
        run(
            capsys,
            "convert",
            tmp_path / "k.safetensors",
            "--to=diffusers",
            "--out",
            tmp_path / "d.safetensors",
        )[0]
        == 0
    )
    assert run(capsys, "scrub", file, "--out", tmp_path / "s.safetensors")[0] == 0
    code, out, _ = run(capsys, "inspect", tmp_path / "d.safetensors", "--json")
    assert code == 0 and json.loads(out)["format"] == "diffusers"


def test_audit_of_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffward.report.schema import validate_report

    code, out, _ = run(capsys, "audit", lora(tmp_path / "a.safetensors"), "--out", tmp_path / "r")
    assert code == 0 and "report.html" in out
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert validate_report(report) == [] and report["membership"] is None


@pytest.mark.parametrize("what", ["attacks", "methods", "bases"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", what, "--json")
    assert code == 0 and all(row["name"] for row in json.loads(out))


def test_cite(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "cite")
    assert code == 0 and "arXiv" in out


def test_an_out_that_cannot_be_written_is_one_line_and_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("x")
    file = lora(tmp_path / "a.safetensors")
    code, _, err = run(capsys, "scrub", file, "--out", tmp_path / "afile" / "x.safetensors")
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("option", [("--pairs", 1), ("--seed", -1), ("--batch", 0)])
def test_numbers_that_make_no_sense(
    option: tuple[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "audit", lora(tmp_path / "a.safetensors"), *option)
    assert code == 2 and option[0] in err


def test_a_background_job_can_be_stopped(monkeypatch, capsys) -> None:
    """A job in the background ignores SIGINT; SIGTERM must stop it all the same, as an interruption."""
    import signal
    import time

    from diffward.commands import main as entry

    def run(name: str, args: list[str]) -> int:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.1)
        return 0

    monkeypatch.setattr(entry, "_run", run)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            entry.main(["doctor"])
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert stopped.value.code == 3
    assert "run the same command again" in capsys.readouterr().err
