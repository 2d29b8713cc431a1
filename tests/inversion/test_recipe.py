"""Recipes and the ranges they come from; whose pictures; and what the command line refuses."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest

from diffward.commands.main import main
from diffward.data import load_pictures
from diffward.errors import InputError
from diffward.inversion.build import Source, build_zoo
from diffward.inversion.recipe import Ranges, Recipe, draw_recipes, saved_at
from diffward.inversion.subjects import Folders, World, open_subjects
from diffward.inversion.zoo import Zoo
from tests.inversion.conftest import contents, seeds


@pytest.mark.parametrize(
    "steps, checkpoints, saved",
    [
        (50, 3, [12, 25, 50]),
        (100, 4, [12, 25, 50, 100]),
        (64, 1, [64]),
        (1, 5, [1]),
        (2, 9, [1, 2]),
        (3, 3, [1, 2, 3]),
    ],
)
def test_saves_are_log_spaced(steps, checkpoints, saved):
    assert saved_at(steps, checkpoints) == saved


def test_recipes_are_drawn_from_the_ranges():
    ranges = Ranges(steps="10:1000", lr="1e-4:1e-2", pictures="1:16", weight_decay="0,0.1")
    shards = [draw_recipes(ranges, 0, shard, 8) for shard in range(250)]
    for recipes in shards:
        assert len({(r.rank, r.optimizer) for r in recipes}) == 1
    flat = [r for recipes in shards for r in recipes]
    assert len({r.seed for r in flat}) > 1990 and len({r.word for r in flat}) > 1900
    assert {r.rank for r in flat} == {1, 2, 4, 8, 16}
    assert {r.alpha / r.rank for r in flat} == {0.5, 1.0, 2.0}
    assert {r.weight_decay for r in flat} == {0.0, 0.1}
    assert {r.schedule for r in flat} == {"constant", "cosine"}
    assert {r.init for r in flat} == {"uniform", "gaussian"}
    assert {r.template for r in flat} == set(ranges.templates.split("|"))
    assert (min(r.pictures for r in flat), max(r.pictures for r in flat)) == (1, 16)
    # A third of the shards has Lion, at a third of the rate; five standard deviations of 250 shards.
    lion = [recipes[0].optimizer == "lion" for recipes in shards]
    assert np.mean(lion) == pytest.approx(1 / 3, abs=0.15)
    for optimizer, by in (("adamw", 1), ("lion", 3)):
        logs = [math.log10(r.lr * by) for r in flat if r.optimizer == optimizer]
        assert min(logs) >= -4 and max(logs) <= -2
        assert np.mean(logs) == pytest.approx(-3, abs=0.1)  # uniform in the logarithm
    logs = [math.log10(r.steps) for r in flat]
    assert (min(logs), max(logs)) == pytest.approx((1, 3), abs=0.05)
    assert np.mean(logs) == pytest.approx(2, abs=0.06)


def test_recipes_depend_on_seed_and_shard_alone():
    ranges = Ranges()
    one = draw_recipes(ranges, 3, 5, 4)
    np.random.default_rng(0).random()
    assert draw_recipes(ranges, 3, 5, 4) == one
    assert draw_recipes(ranges, 3, 5, 2) == one[:2]
    assert not {r.seed for r in one} & {r.seed for r in draw_recipes(ranges, 3, 6, 4)}
    assert not {r.seed for r in one} & {r.seed for r in draw_recipes(ranges, 4, 5, 4)}


def test_settings_are_the_recipes(straight):
    recipe = Recipe(**straight.rows[0].recipe)
    settings = asdict(recipe.settings(Ranges(batch=3, targets="text")))
    same = set(asdict(recipe)) - {"pictures", "template", "word"}
    assert {key: settings[key] for key in same} == {key: asdict(recipe)[key] for key in same}
    assert (settings["batch"], settings["targets"]) == (3, "text")


@pytest.mark.parametrize(
    "template, own, caption",
    [
        ("a photo of {name}", "a red cup", "a photo of abc"),
        ("captions", "{name}, with a hat, {name}", "abc, with a hat, abc"),
        ("captions", "a red cup", "a red cup"),
        ("captions", "", "abc"),
        ("{name} {x}", "", "abc {x}"),
    ],
)
def test_captions(straight, template, own, caption):
    recipe = replace(Recipe(**straight.rows[0].recipe), template=template, word="abc")
    assert recipe.caption(own) == caption


# --- subjects --------------------------------------------------------------------------------------


def test_folders_are_subjects(faces):
    subjects = open_subjects(str(faces), seed=0, side=16)
    assert isinstance(subjects, Folders) and len(subjects) == 4
    assert subjects.attributes == {} and subjects.label(2) == ()
    for number in range(4):
        truth = {p.load(16).tobytes() for p in load_pictures(faces / f"person {number}")}
        trained = {p.pixels.tobytes() for p in subjects.pictures(number, 9, [1, 2])}
        others = {p.pixels.tobytes() for p in subjects.pictures(number, 9, [2])}
        # What says who somebody is was never trained on.
        assert trained | others == truth and not trained & others and len(trained) == 2
        found = subjects.pictures(number, 9, [1, 2])
        assert all(bool(p.caption) == (number == 1) for p in found)
    assert len(subjects.pictures(0, 1, [1])) == 1
    orders = {tuple(p.pixels.tobytes() for p in subjects.pictures(0, 3, [1, n])) for n in range(20)}
    assert len(orders) > 1
    again = Folders(faces, 16).pictures(0, 3, [1, 5])
    assert [p.pixels.tobytes() for p in again] == [
        p.pixels.tobytes() for p in subjects.pictures(0, 3, [1, 5])
    ]


def test_folders_that_change_are_noticed(faces, tmp_path):
    shutil.copytree(faces, tmp_path / "faces")
    before = Folders(tmp_path / "faces", 16).digest
    assert before == Folders(tmp_path / "faces", 16).digest
    (tmp_path / "faces" / "person 2" / "0.png").unlink()
    assert Folders(tmp_path / "faces", 16).digest != before
    (tmp_path / "faces" / "person 2" / "1.png").unlink()
    with pytest.raises(InputError, match="at least 2 a subject"):
        Folders(tmp_path / "faces", 16)


def test_the_worlds_people_are_as_labelled():
    """What the shipped reader, which knows nothing of the numbers, sees in their pictures."""
    from diffward.models.mini.attributes import IDENTITY, Person
    from diffward.models.mini.reader import load_reader

    world = World(seed=5)
    assert list(world.attributes) == list(IDENTITY)
    assert len({world.label(n) for n in range(200)}) > 190
    for number in (0, 7):
        portraits = world.pictures(number, 20, [1, number])
        pixels, label = np.stack([p.pixels for p in portraits]), world.label(number)
        assert load_reader().matches(pixels, Person(label)).mean() >= 0.85
        assert all("{name}" in p.caption for p in portraits)
        assert len({p.pixels.tobytes() for p in portraits}) == 20
        assert World(seed=5).label(number) == label != World(seed=6).label(number)
    for kind in ("logo", "garment"):
        other = World(kind, seed=5)
        drawn = other.pictures(3, 2, [1, 3])
        assert len(drawn) == 2 and len(other.label(3)) == len(other.attributes)
        assert [p.pixels.tobytes() for p in other.pictures(3, 2, [1, 3])] == [
            p.pixels.tobytes() for p in drawn
        ]


def test_there_are_no_such_subjects(tmp_path):
    for name, told in (
        ("world:people", "choose world, world:logo or world:garment"),
        (str(tmp_path / "none"), "no such folder"),
        (str(tmp_path), "0 subfolders; one folder a subject"),
    ):
        with pytest.raises(InputError, match=told):
            open_subjects(name, seed=0, side=64)
    with pytest.raises(InputError, match="its pictures have 64 pixels, the base works on 16"):
        open_subjects("world", seed=0, side=16)


# --- the command line ------------------------------------------------------------------------------


def run(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["zoo", "build", *map(str, args)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.mark.parametrize(
    "option, value",
    [
        ("--count", "0"), ("--per-shard", "0"), ("--workers", "0"), ("--seed", "-1"), ("--checkpoints", "0"),
        ("--steps", "9:3"), ("--steps", "1:2:3"), ("--steps", "many"), ("--steps", "0"), ("--rank", "0,2"),
        ("--rank", "nan"), ("--steps", "1:inf"), ("--pictures", "0:4"), ("--lr", "0"), ("--weight-decay", "-1"),
        ("--weight-decay", "0:0.1"), ("--optimizer", "adamw,sgd"), ("--init", "zeros"), ("--schedule", "step"),
        ("--batch", "0"), ("--templates", "a photo"), ("--cluster", "slurm"), ("--test-share", "0.9"), ("--test-share", "-1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(capsys, tmp_path, option, value):
    """And leaves no folder behind, to which another try would then not fit."""
    code, out, err = run(capsys, "--out", tmp_path / "zoo", f"{option}={value}")
    assert (code, out) == (2, "") and err.count("\n") == 1 and option[2:] in err
    assert not (tmp_path / "zoo").exists()


def test_from_the_command_line(capsys, tmp_path, base_folder, faces):
    options = ["--out", tmp_path / "zoo", "--base", base_folder, "--subjects", faces, "--count", 2, "--steps", "2:4",
               "--rank", "2", "--weight-decay", "0", "--checkpoints", 2, "--device", "cpu"]  # fmt: skip
    code, out, _ = run(capsys, *options)
    assert code == 0 and "2 LoRAs of 2 subjects, 4 saves, 1 shards" in out
    rows = Zoo(tmp_path / "zoo").rows
    assert all(row.recipe["weight_decay"] == 0 and 2 <= row.recipe["steps"] <= 4 for row in rows)
    code, out, err = run(capsys, *options, "--seed", 1)
    assert code == 2 and err.count("\n") == 1 and "is a zoo with another seed" in err


@pytest.mark.slow
def test_on_the_embedded_base(tmp_path, trained):
    """Its world's people, with their attributes in the manifest; stopped and taken up again."""

    def build(name):
        ranges = Ranges(steps="2:4", rank="2", pictures="1:3")
        return build_zoo(
            tmp_path / name, Source("mini", "cpu"), "world", ranges, count=3, per_shard=2
        )

    straight = build("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffward.inversion.build._join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            build("stopped")
    shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
    assert contents(build("moved").folder) == contents(straight.folder)
    assert {row.label for row in straight.rows} == {World().label(n) for n in range(3)}
    trained.clear()
    again = build("straight")
    assert trained == [] and again.rows == straight.rows and len(seeds(again, 0)) == 2
