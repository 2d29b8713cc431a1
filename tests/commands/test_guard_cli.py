"""`diffward guard`: from two folders to a mask, a run under it and the verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffward.commands.main import GROUPS
from tests.commands.guarding import TINY, TRAIN, call, changed_mask, draw, run, weights

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
