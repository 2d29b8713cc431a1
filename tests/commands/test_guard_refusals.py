"""What `diffward guard` refuses, in one line and with nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.commands.guarding import TINY, TRAIN, call, changed_mask, draw, one_line


def drop(data: dict[str, Any]) -> None:
    del data["tensors"]["conv_in.weight"]


def more(data: dict[str, Any]) -> None:
    data["tensors"]["conv_somewhere.weight"] = data["tensors"]["conv_in.weight"]


def reshape(data: dict[str, Any]) -> None:
    data["tensors"]["conv_in.weight"]["shape"] = [8, 4, 1, 1]


def other_values(data: dict[str, Any]) -> None:
    data["tensors"]["conv_in.weight"]["sha256"] = {"fp32": "0" * 32}


def nothing(data: dict[str, Any]) -> None:
    for row in data["tensors"].values():
        row["frozen"] = False


def everything(data: dict[str, Any]) -> None:
    for row in data["tensors"].values():
        row["frozen"] = True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "conv_in.weight"), (more, "conv_somewhere.weight"), (reshape, "8 x 4 x 1 x 1"),
        (other_values, "other values"), (nothing, "freezes nothing"), (everything, "every tensor"),
        (lambda data: data.pop("tensors"), "damaged"), (lambda data: data.update(schema="x"), "schema"),
        (lambda data: data["tensors"]["conv_in.weight"].update(score=float("nan")), "damaged"),
        (lambda data: data.update(budget=3), "damaged"), (lambda data: data.update(domains=["red"]), "damaged"),
        (lambda data: data["domains"]["illegal"].pop("pictures"), "damaged"),
    ],
)  # fmt: skip
def test_train_refuses_a_mask_that_is_not_this_bases(
    change: Callable[[dict[str, Any]], object], said: str, learned: Path, folders: tuple[Path, Path],
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mask = changed_mask(learned, tmp_path / "mask.json", change)
    line = [
        "guard",
        "train",
        folders[0],
        "--mask",
        mask,
        "--base",
        base_folder,
        "--out",
        tmp_path / "out",
    ]
    assert said in one_line(capsys, *line, *TRAIN)
    assert not (tmp_path / "out").exists()


def test_masks_that_cannot_be_read(
    learned: Path, folders: tuple[Path, Path], base_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = (learned / "mask.json").read_text()
    count = len(json.loads(text)["tensors"])
    files = {
        "cut": (text[: len(text) // 2], "not a mask"), "empty": ("", "not a mask"),
        "short": ("1.0\n0.0\n", "2 lines"), "long": ("1\n" * (count + 1), f"{count + 1} lines"),
        "words": ("frozen\nfree\n", "one number a line"), "zeros": ("0\n" * count, "freezes nothing"),
    }  # fmt: skip
    for name, (content, said) in files.items():
        (tmp_path / name).write_text(content)
        line = ["guard", "train", folders[0], "--mask", tmp_path / name, "--base", base_folder]
        assert said in one_line(capsys, *line, "--out", tmp_path / "out", *TRAIN), name
    line = ["guard", "train", folders[0], "--base", base_folder, "--out", tmp_path / "out", *TRAIN]
    assert "--mask is missing" in one_line(capsys, *line)
    assert "no such mask" in one_line(capsys, *line, "--mask", tmp_path / "nowhere.json")
    assert not (tmp_path / "out").exists()
    said = one_line(capsys, "guard", "verify", base_folder, base_folder, tmp_path / "zeros")
    assert "guard apply" in said


def test_apply_refuses(
    learned: Path, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed_mask(learned, tmp_path / "other.json", other_values)
    edits = {"name": {"conv_middle.weight": torch.zeros(2)}, "shape": {"conv_in.bias": torch.zeros(3)},
             "nan": {"conv_in.bias": torch.full((8,), float("nan"))}, "none": {}}  # fmt: skip
    for name, tensors in edits.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"no tensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    mask, line = learned / "mask.json", ["guard", "apply", base_folder]
    cases: list[tuple[list[object], str]] = [
        ([], "--mask or --edit is missing"), (["--mask", other], "other values"),
        (["--mask", tmp_path / "nowhere.json"], "no such mask"),
        (["--edit", tmp_path / "name.safetensors"], "conv_middle.weight"),
        (["--edit", tmp_path / "shape.safetensors"], "conv_in.bias of that shape"),
        (["--edit", tmp_path / "nan.safetensors"], "not finite"),
        (["--edit", tmp_path / "none.safetensors"], "no tensor"),
        (["--edit", tmp_path / "cut.safetensors"], "cannot be read"),
    ]  # fmt: skip
    for options, said in cases:
        assert said in one_line(capsys, *line, *options, "--out", tmp_path / "out"), options
        assert not (tmp_path / "out").exists()
    save_file({"conv_in.bias": torch.zeros(8)}, tmp_path / "good.safetensors")
    for options in (["--mask", mask], ["--edit", tmp_path / "good.safetensors"]):
        assert "no diffusers folder" in one_line(
            capsys, *line, *options, "--out", tmp_path / "full"
        )
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["diary.txt"]
    said = one_line(
        capsys, *line, "--edit", tmp_path / "good.safetensors", "--out", tmp_path / "x.json"
    )
    assert "name a folder" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "0"], "above 0 and below 1"), (["--budget", "1"], "above 0 and below 1"),
        (["--budget", "100%"], "budget"), (["--budget", ".nan"], "above 0 and below 1"),
        (["--budget", "1e-6"], "no tensor"), (["--by", "weight"], "--by weight"),
        (["--method", "melt"], "unknown guard 'melt'"), (["--batch", "1"], "--batch 1"),
        (["--edit", "nowhere.safetensors"], "nowhere.safetensors"), (["--method", "uce"], "--concepts"),
    ],
)  # fmt: skip
def test_learn_refuses_settings(
    options: list[str], said: str, learning: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert said in one_line(capsys, *learning, "--out", tmp_path / "out", *options)
    assert not list((tmp_path / "out").glob("*.json")) and not list(tmp_path.glob("**/.*"))


def test_learn_refuses_domains(
    folders: tuple[Path, Path], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    illegal, innocent = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    same = tmp_path / "same"
    shutil.copytree(innocent, same)
    shutil.copy(illegal / "secret-name-0.png", same / "x.png")
    copied = tmp_path / "copied"
    shutil.copytree(innocent, copied)
    Image.open(illegal / "secret-name-0.png").resize((20, 20)).save(copied / "y.jpg", quality=95)
    out, line = (
        tmp_path / "out",
        ["guard", "learn", "--base", base_folder, *TINY, "--out", tmp_path / "out"],
    )
    cases = [
        ((illegal, empty), "no pictures in it"), ((empty, innocent), "no pictures in it"),
        ((illegal, ""), "--innocent is missing"), (("", innocent), "--illegal is missing"),
        ((illegal, same), "share 1 pictures"), ((illegal, copied), "share 1 pictures"),
        ((illegal, f"{innocent},{same}"), "share 1 pictures"), ((illegal, illegal), "share 5 pictures"),
    ]  # fmt: skip
    for (one, two), said in cases:
        assert said in one_line(capsys, *line, "--illegal", one, "--innocent", two), (one, two)
    assert not out.exists()


def test_another_runs_folder_is_refused(
    learned: Path, learning: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(learned, out)
    assert "another seed" in one_line(capsys, *learning, "--out", out, "--seed", 1)
    assert "another method" in one_line(capsys, *learning, "--out", out, "--method", "random")
    (out / "work" / "run.json").write_text("{")
    assert "cannot be read" in one_line(capsys, *learning, "--out", out)
    shutil.rmtree(out / "work")
    assert "is there already" in one_line(capsys, *learning, "--out", out)
    assert (out / "mask.json").read_bytes() == (learned / "mask.json").read_bytes()


@pytest.mark.parametrize("when", ["fine-tuning", "simulated user"])
def test_a_loss_that_is_not_finite_stops_the_run(
    when: str, learning: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from diffward.finetune.plain import Plain
    from diffward.guard.bilevel import Simulation
    from diffward.models.denoiser import Denoiser

    real, whose, inside = Denoiser.errors, Plain if when == "fine-tuning" else Simulation, []
    loss: Any = whose.loss

    def watched(self: Any, *args: Any) -> torch.Tensor:
        inside.append(1)
        try:
            return loss(self, *args)
        finally:
            inside.pop()

    def errors(self: Denoiser, *args: torch.Tensor) -> torch.Tensor:
        return real(self, *args) * (float("nan") if inside else 1)

    monkeypatch.setattr(whose, "loss", watched)
    monkeypatch.setattr(Denoiser, "errors", errors)
    said = one_line(capsys, *learning, "--out", tmp_path / "out")
    assert "not finite" in said and "step" in said and "secret-name" in said
    assert ("simulated user" in said) == (when == "simulated user")
    assert (
        not (tmp_path / "out" / "mask.json").exists()
        and not (tmp_path / "out" / "run.json").exists()
    )


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["weights", "mask", "plot", "checkpoint"])
def test_a_full_disk_leaves_nothing_half_written(
    what: str, learning: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from matplotlib.figure import Figure
    from safetensors import SafetensorError

    out, real = tmp_path / "out", Path.write_text

    def half(path: Path, text: str, **given: Any) -> int:
        if "mask.json" in path.name:
            real(path, text[: len(text) // 2], **given)
            full()
        return real(path, text, **given)

    def cut(tensors: object, path: Path, *_: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    def torn(state: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    with monkeypatch.context() as patch:
        if what == "weights":
            patch.setattr("diffward.guard.stored.save_file", cut)
        elif what == "mask":
            patch.setattr(Path, "write_text", half)
        elif what == "plot":
            patch.setattr(Figure, "savefig", full)
        else:
            patch.setattr(torch, "save", torn)
        said = one_line(capsys, *learning, "--out", out)
    assert "make room" in said
    assert not (out / "run.json").exists() and not list(out.rglob(".*"))
    for path in out.rglob("*.json"):
        json.loads(path.read_text())
    assert not [p for p in out.rglob("*.safetensors") if p.stat().st_size < 100]
    # With room again, the same command ends well.
    assert call(*learning, "--out", out) == 0
    assert (out / "mask.json").exists() and (out / "run.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_really_full(learning: list[object], tmp_path: Path) -> None:
    """Files of more than 64 KiB cannot be written: the system's own errors, not those that a test made up."""
    out = tmp_path / "out"
    args = [str(a) for a in [*learning, "--out", out]]
    code = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "from diffward.commands.main import main\n"
        f"main({args!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "make room" in done.stderr.strip().splitlines()[-1]
    assert not list(out.rglob("*.safetensors")) and not list(out.rglob(".*"))


def test_evaluate_refuses(
    case: list[object], learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {str(case[i]): case[i + 1] for i in range(2, len(case), 2)}
    held, mask = Path(str(options["--illegal-held-out"])), ["--mask", learned / "mask.json"]
    other = changed_mask(learned, tmp_path / "other.json", other_values)
    copied, again = tmp_path / "copied", tmp_path / "again" / "ann"
    shutil.copytree(held / "ann", copied / "zoe")
    draw(again, 2, seed=60)
    cases: list[tuple[list[object], str]] = [
        ([], "--mask or --edit is missing"), (["--mask", other], "other values"),
        ([*mask, "--subjects", "zoe"], "no pictures of zoe"),
        ([*mask, "--illegal-held-out", held / "ann"], "no pictures of ann"),
        ([*mask, "--illegal", held / "ann", "--illegal-held-out", held / "ann", "--others", ""], "--others is missing"),
        ([*mask, "--others", held], "rename"), ([*mask, "--innocent", ""], "--innocent is missing"),
        ([*mask, "--eye", "glass"], "--eye glass"), ([*mask, "--attackers", "[melt]"], "unknown attacker"),
        ([*mask, "--attackers", "[dreambooth]"], "class prompt"),
        ([*mask, "--innocent-held-out", options["--innocent"]], "training pictures too"),
        ([*mask, "--innocent", options["--illegal"]], "--illegal and --innocent (held-out pictures included) share"),
        ([*mask, "--innocent-held-out", options["--illegal"]], "(held-out pictures included) share"),
        ([*mask, "--others", copied], "--others: 2 pictures are in --illegal"),
        ([*mask, "--illegal", f"{held / 'ann'},{again}"], "two folders have a subject ann"),
    ]  # fmt: skip
    for more_options, said in cases:
        assert said in one_line(capsys, *case, *more_options, "--out", tmp_path / "out"), (
            more_options
        )
    assert not list(tmp_path.glob("out/*.html"))
