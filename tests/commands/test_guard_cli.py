"""`diffward guard`: from two folders to a mask, a run under it and the verdict; and what it refuses, in one line."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffward.commands.main import GROUPS, main

TINY = [
    "--tune-steps", "2", "--updates", "2", "--interval", "1", "--batch", "2", "--device", "cpu", "--cache", "false",
]  # fmt: skip
TRAIN = ["--steps", "2", "--batch", "2", "--device", "cpu", "--cache", "false", "--seed", "3"]


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return int(stop.value.code or 0)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = call(*args)
    out, err = capsys.readouterr()
    return code, out, err


def draw(folder: Path, n: int = 4, seed: int = 7) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        block = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(block).resize((24, 24), Image.Resampling.BICUBIC)
        image.save(folder / f"secret-name-{i}.png")
        (folder / f"secret-name-{i}.txt").write_text(f"a secret caption {i}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The forbidden and the allowed domain."""
    root = tmp_path_factory.mktemp("domains")
    return draw(root / "forbidden", 5, seed=1), draw(root / "allowed", 4, seed=2)


@pytest.fixture(scope="module")
def learning(folders: tuple[Path, Path], base_folder: Path) -> list[object]:
    """The command line that learns, without --out."""
    illegal, innocent = folders
    return [
        "guard", "learn", "--illegal", illegal, "--innocent", innocent, "--base", base_folder, *TINY,
        "--illegal-name", "drawn squares",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def learned(learning: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed: copy it first."""
    out = tmp_path_factory.mktemp("learned") / "out"
    assert call(*learning, "--out", out) == 0
    return out


def changed_mask(learned: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((learned / "mask.json").read_text())
    change(data)
    to.write_text(json.dumps(data))
    return to


# --- the commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_group_lists_its_commands(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "guard", *args)
    assert code == 0 and "diffward guard" in out
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert listed == set(GROUPS["guard"]) == {"learn", "apply", "train", "verify", "evaluate"}


@pytest.mark.parametrize("name", GROUPS["guard"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "guard", name, "--help")
    assert code == 0 and f"diffward guard {name}" in out


def test_an_unknown_command_is_named_with_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "guard", "thaw")
    assert code == 2 and "'thaw'" in err and "verify" in err and err.count("\n") == 1


def test_train_differs_from_train_only_in_its_defaults() -> None:
    import inspect
    from dataclasses import asdict

    from diffward.commands.guard.train import MaskedSettings
    from diffward.commands.main import command
    from diffward.finetune import Settings

    plain, guarded = (inspect.signature(command(n)).parameters for n in ("train", "guard train"))
    assert list(plain) == list(guarded)
    differ = {n for n in plain if plain[n].default != guarded[n].default}
    assert differ == {"mask", "out"}
    before, now = asdict(Settings()), asdict(MaskedSettings())
    assert {k for k in now if now[k] != before[k]} == {"tune", "lr"} and list(now) == list(before)


def test_guards_are_listed_and_cited(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "guards", "--json")
    assert code == 0
    assert {"freeze", "random", "uce", "imma"} <= {row["name"] for row in json.loads(out)}
    code, out, _ = run(capsys, "cite")
    assert code == 0 and all(paper in out for paper in ("2405.17472", "2308.14761", "2311.18815"))


# --- learn -------------------------------------------------------------------------------------------


def test_learn_writes_a_mask_that_meets_the_budget(learned: Path, base_folder: Path) -> None:
    assert {p.name for p in learned.iterdir()} == {
        "mask.json", "mask.png", "config.yaml", "run.json", "work",
    }  # fmt: skip
    data = json.loads((learned / "mask.json").read_text())
    base = weights(base_folder)
    assert {n: tuple(t["shape"]) for n, t in data["tensors"].items()} == {
        n: tuple(t.shape) for n, t in base.items()
    }
    sizes = {n: t.numel() for n, t in base.items()}
    total = sum(sizes.values())
    held = sum(sizes[n] for n, t in data["tensors"].items() if t["frozen"])
    smallest = min(sizes[n] for n, t in data["tensors"].items() if not t["frozen"])
    assert held <= 0.3 * total < held + smallest
    assert data["parameter_share"] == pytest.approx(held / total)
    assert data["domains"] == {
        "illegal": {"name": "drawn squares", "pictures": 5}, "innocent": {"name": "innocent", "pictures": 4},
    }  # fmt: skip
    assert set(data["losses"]) == {"base", "tuned", "masked"}
    with Image.open(learned / "mask.png") as picture:
        assert picture.format == "PNG" and picture.width > 600


def test_what_is_passed_on_says_nothing_of_the_data(
    learned: Path, folders: tuple[Path, Path]
) -> None:
    from diffward.data import load_pictures

    hashes = [h for folder in folders for h in load_pictures(folder).hashes]
    for name in ("mask.json", "run.json"):
        text = (learned / name).read_text()
        assert "secret" not in text and not any(h[:16] in text for h in hashes)
        assert str(folders[0].parent) not in text and "/tmp" not in text, name


def test_run_json_says_what_ran(learned: Path) -> None:
    told = json.loads((learned / "run.json").read_text())
    assert told["method"] == "freeze" and told["wall_seconds"] > 0
    assert told["versions"]["torch"] and told["hardware"]["device"] == "cpu"
    assert told["found"]["user_losses"]["illegal"] > 0 and told["settings"]["tune_steps"] == 2


def test_no_copy_of_the_weights_is_left_behind(learned: Path) -> None:
    assert [p.name for p in (learned / "work").iterdir()] == ["run.json"]


def test_a_finished_run_returns_at_once(
    learned: Path, learning: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(learned, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    monkeypatch.setattr("diffward.guard.run.encode_pictures", None)
    code, said, _ = run(capsys, *learning, "--out", out)
    assert code == 0 and "mask.json" in said
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_the_settings_it_wrote_repeat_it(learned: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert call("guard", "learn", "--config", learned / "config.yaml", "--out", out) == 0
    one, two = (json.loads((p / "mask.json").read_text()) for p in (learned, out))
    assert one == two
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["out"] == str(out) and config["budget"] == 0.3


def test_an_interrupted_run_goes_on_where_it_stopped(
    learned: Path, learning: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from diffward.guard import bilevel

    out, real, seen = tmp_path / "out", bilevel.one_update, []

    def counted(simulation: Any, upper: Any, done: int) -> list[float]:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(simulation, upper, done)

    monkeypatch.setattr(bilevel, "one_update", counted)
    code, _, err = run(capsys, *learning, "--out", out, "--checkpoint-every", 1)
    assert code == 3 and "run the same command again" in err
    assert not (out / "mask.json").exists() and not (out / "run.json").exists()
    assert call(*learning, "--out", out, "--checkpoint-every", 1) == 0
    assert seen == [0, 1, 1]
    one, two = (json.loads((p / "mask.json").read_text()) for p in (learned, out))
    assert one["tensors"] == two["tensors"]


def test_several_folders_are_one_domain(
    learning: list[object], folders: tuple[Path, Path], base_folder: Path, tmp_path: Path
) -> None:
    more, out = draw(tmp_path / "more", 3, seed=5), tmp_path / "out"
    line = [
        "guard", "learn", "--illegal", folders[0], "--innocent", f"{folders[1]}, {more}", "--base", base_folder,
        "--method", "fisher", "--by", "tensors", "--out", out, *TINY,
    ]  # fmt: skip
    assert call(*line) == 0
    data = json.loads((out / "mask.json").read_text())
    assert data["domains"]["innocent"]["pictures"] == 7
    frozen = [t["frozen"] for t in data["tensors"].values()]
    assert sum(frozen) == round(0.3 * len(frozen))


def test_an_edit_is_tensors_and_nothing_else(base_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [
        "--method",
        "uce",
        "--concepts",
        "cup, sks dog",
        "--guide",
        "boat",
        "--base",
        base_folder,
    ]
    assert call("guard", "learn", *line, *TINY, "--out", out) == 0
    assert {p.name for p in out.iterdir()} == {
        "edit.safetensors",
        "config.yaml",
        "run.json",
        "work",
    }
    base, edit = weights(base_folder), load_file(out / "edit.safetensors")
    assert set(edit) == {n for n in base if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert any(not torch.equal(edit[n], base[n]) for n in edit)
    with safe_open(out / "edit.safetensors", "pt") as file:
        assert not file.metadata()
    told = json.loads((out / "run.json").read_text())
    assert told["edited_tensors"] == len(edit) and "cup" not in json.dumps(told)


def test_a_mask_of_an_edited_base_holds_its_values(
    learning: list[object], base_folder: Path, tmp_path: Path
) -> None:
    from diffward.models.parameters import tensor_hash

    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    base = weights(base_folder)
    edited = base[name] + 1
    save_file({name: edited}, tmp_path / "edit.safetensors")
    line = [*learning, "--method", "random", "--edit", tmp_path / "edit.safetensors"]
    assert call(*line, "--out", tmp_path / "out") == 0
    data = json.loads((tmp_path / "out" / "mask.json").read_text())
    assert data["edited_tensors"] == 1
    for key, row in data["tensors"].items():
        assert row["sha256"]["fp32"] == tensor_hash(edited if key == name else base[key])


# --- apply -------------------------------------------------------------------------------------------


def test_a_guarded_folder_is_the_base_with_its_mask(
    learned: Path, folders: tuple[Path, Path], base_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "guarded"
    assert call("guard", "apply", base_folder, "--mask", learned / "mask.json", "--out", out) == 0
    base, guarded = weights(base_folder), weights(out)
    assert guarded.keys() == base.keys() and all(torch.equal(guarded[n], base[n]) for n in base)
    one, two = (json.loads((p / "mask.json").read_text())["tensors"] for p in (learned, out))
    assert one == two
    # The folder is base and mask in one.
    line = ["guard", "train", folders[1], "--base", out, "--mask", out, "--out", tmp_path / "t"]
    assert call(*line, *TRAIN) == 0
    assert call("guard", "verify", out, tmp_path / "t" / "pipeline", out) == 0


def test_positions_get_the_names_of_the_base(base_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    own = UNet2DConditionModel.from_pretrained(base_folder, subfolder="unet")
    names = [name for name, _ in own.named_parameters()]
    frozen = [i % 3 == 0 for i in range(len(names))]
    np.savetxt(tmp_path / "mask_t_0_4.txt", np.array(frozen, dtype=float))
    line = ["guard", "apply", base_folder, "--mask", tmp_path / "mask_t_0_4.txt"]
    assert call(*line, "--out", tmp_path / "mask.json") == 0
    data = json.loads((tmp_path / "mask.json").read_text())
    assert [(n, t["frozen"]) for n, t in data["tensors"].items()] == list(zip(names, frozen))
    assert data["base"] == base_folder.name and str(base_folder.parent) not in json.dumps(data)
    assert call("guard", "verify", base_folder, base_folder, tmp_path / "mask.json") == 0
    assert call(*line, "--out", tmp_path / "folder") == 0
    assert json.loads((tmp_path / "folder" / "mask.json").read_text())["tensors"] == data["tensors"]


def test_an_edit_and_a_mask_learned_on_it_are_one_base(
    learning: list[object], base_folder: Path, tmp_path: Path
) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    base, edit = weights(base_folder), tmp_path / "edit.safetensors"
    save_file({name: base[name] + 1}, edit)
    assert call(*learning, "--method", "fisher", "--edit", edit, "--out", tmp_path / "l") == 0
    line = ["guard", "apply", base_folder, "--edit", edit]
    assert call(*line, "--mask", tmp_path / "l" / "mask.json", "--out", tmp_path / "both") == 0
    assert call(*line, "--out", tmp_path / "edited") == 0
    for folder in ("both", "edited"):
        guarded = weights(tmp_path / folder)
        assert torch.equal(guarded[name], base[name] + 1)
        assert all(torch.equal(guarded[n], base[n]) for n in base if n != name)
    one, two = (json.loads((tmp_path / p / "mask.json").read_text()) for p in ("l", "both"))
    assert two["edited_tensors"] == 1 and one["tensors"].keys() == two["tensors"].keys()
    for key, row in one["tensors"].items():
        assert two["tensors"][key] == {**row, "score": pytest.approx(row["score"], rel=1e-6)}
    assert not (tmp_path / "edited" / "mask.json").exists()


# --- train and verify --------------------------------------------------------------------------------


def test_what_is_frozen_stays_bit_for_bit_and_verify_agrees(
    learned: Path, folders: tuple[Path, Path], base_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, mask = tmp_path / "out", learned / "mask.json"
    line = ["guard", "train", folders[0], "--mask", mask, "--base", base_folder, "--out", out]
    assert call(*line, *TRAIN) == 0
    base, tuned = weights(base_folder), weights(out / "pipeline")
    rows = json.loads(mask.read_text())["tensors"]
    moved = {n for n in base if not torch.equal(base[n], tuned[n])}
    assert moved and not moved & {n for n, r in rows.items() if r["frozen"]}
    assert json.loads((out / "run.json").read_text())["frozen_tensors"] == sum(
        r["frozen"] for r in rows.values()
    )
    code, said, _ = run(capsys, "guard", "verify", base_folder, out / "pipeline", mask)
    assert code == 0 and "kept to the mask" in said

    frozen = next(n for n, r in rows.items() if r["frozen"])
    tuned[frozen] = tuned[frozen] + 1e-3
    save_file(tuned, out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    code, said, _ = run(capsys, "guard", "verify", base_folder, out / "pipeline", mask, "--json")
    told = json.loads(said)
    assert code == 1 and told["ok"] is False and [m["name"] for m in told["moved"]] == [frozen]


def test_without_the_mask_the_frozen_tensors_would_have_moved(
    learned: Path, folders: tuple[Path, Path], base_folder: Path, tmp_path: Path
) -> None:
    line = ["train", folders[0], "--tune", "full", "--base", base_folder, "--out", tmp_path / "o"]
    assert call(*line, *TRAIN) == 0
    base, tuned = weights(base_folder), weights(tmp_path / "o" / "pipeline")
    rows = json.loads((learned / "mask.json").read_text())["tensors"]
    assert any(r["frozen"] and not torch.equal(base[n], tuned[n]) for n, r in rows.items())


def test_a_lora_under_a_mask_leaves_out_what_is_frozen(
    learned: Path, folders: tuple[Path, Path], base_folder: Path, tmp_path: Path
) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"

    def one(data: dict[str, Any]) -> None:
        for key, row in data["tensors"].items():
            row["frozen"] = key == name

    mask = changed_mask(learned, tmp_path / "one.json", one)
    line = ["train", folders[0], "--mask", mask, "--base", base_folder, "--out", tmp_path / "out"]
    assert call(*line, *TRAIN, "--targets", "attn1.to_q,attn1.to_k") == 0
    adapted = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert not any("mid_block" in k and "to_q" in k for k in adapted)
    assert any("mid_block" in k and "to_k" in k for k in adapted)
    assert any("down_blocks" in k and "to_q" in k for k in adapted)


# --- evaluate ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny image model of random weights."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("eye")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return f"transformers:{folder}"


@pytest.fixture(scope="module")
def case(base_folder: Path, eye: str, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The command line that evaluates, without guards and --out: subjects ann and bob, and eve, who is nobody's."""
    root = tmp_path_factory.mktemp("case")
    for seed, name in enumerate(("ann", "bob")):
        draw(root / "train" / name, 2, seed=10 + seed)
        draw(root / "held" / name, 2, seed=20 + seed)
    draw(root / "others" / "eve", 3, seed=30)
    return [
        "guard", "evaluate", "--illegal", root / "train", "--illegal-held-out", root / "held",
        "--others", root / "others", "--innocent", draw(root / "in", 2, seed=40), "--innocent-held-out",
        draw(root / "in-held", 2, seed=41), "--base", base_folder, "--eye", eye, "--attackers", "[full]", "--seeds", "[0]",
        "--pictures", 2, "--innocent-pictures", 2, "--draw-steps", 2, "--pairs", 2, "--resamples", 100,
        "--attack.steps", 1, "--attack.batch", 2, "--device", "cpu", "--cache", "false",
    ]  # fmt: skip


def test_evaluate_writes_a_page_and_its_figures(
    case: list[object], learned: Path, base_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: weights(base_folder)[name] + 1}, tmp_path / "edit.safetensors")
    line = [
        *case,
        "--mask",
        learned / "mask.json",
        "--edit",
        f"moved={tmp_path / 'edit.safetensors'}",
    ]
    code, said, err = run(capsys, *line, "--out", tmp_path / "out")
    assert code == 0, err
    page, found = (
        Path(line.split(" ", 1)[1]) for line in (said.splitlines()[-1], said.splitlines()[-2])
    )
    assert page.suffix == ".html" and page.parent == tmp_path / "out"
    data = json.loads(found.read_text())
    assert [g["name"] for g in data["guards"]] == [
        "none",
        "moved",
        "random",
        "freeze",
        "freeze+moved",
    ]
    shares = {g["name"]: g["parameter_share"] for g in data["guards"]}
    assert shares["none"] == shares["moved"] == 0 and shares["freeze"] == shares["freeze+moved"]
    assert 0 < shares["random"] <= shares["freeze"]
    assert data["domains"]["illegal"]["subjects"] == ["ann", "bob"]
    assert (
        data["domains"]["illegal"]["training"] == 4 and data["domains"]["innocent"]["held_out"] == 2
    )
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["attack"]["steps"] == 1 and config["seeds"] == [0] and "settings" not in config
    cells = (tmp_path / "out" / "work").glob("*.json")
    before = {p: p.stat().st_mtime_ns for p in cells}
    assert before
    assert call("guard", "evaluate", "--config", tmp_path / "out" / "config.yaml") == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    text = found.read_text() + page.read_text()
    assert str(tmp_path) not in text and "secret-name" not in text


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
        ([*mask, "--innocent", options["--illegal"]], "--illegal and --innocent share"),
        ([*mask, "--innocent-held-out", options["--illegal"]], "--illegal and --innocent share"),
        ([*mask, "--others", copied], "--others: 2 pictures are in --illegal"),
        ([*mask, "--illegal", f"{held / 'ann'},{again}"], "two folders have a subject ann"),
    ]  # fmt: skip
    for more_options, said in cases:
        assert said in one_line(capsys, *case, *more_options, "--out", tmp_path / "out"), (
            more_options
        )
    assert not list(tmp_path.glob("out/*.html"))


# --- bad input ---------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The line that a refused command prints; it exits with 2 and writes no traceback."""
    code, _, err = run(capsys, *args)
    lines = [line for line in err.strip().splitlines() if line.startswith("diffward")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


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


# --- the page ----------------------------------------------------------------------------------------


def test_commands_of_the_page_parse() -> None:
    import re
    import shlex

    from diffward.commands.cli import parse
    from diffward.commands.main import command, find

    page = (Path(__file__).parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")
    seen = set()
    for block in re.findall(r"```\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("diffward "):
                name, args = find(shlex.split(line.split(" #")[0])[1:])
                assert parse(command(name), f"diffward {name}", args), line
                seen.add(name)
    assert seen == {f"guard {name}" for name in GROUPS["guard"]}
