"""One zoo and no other: who may build it, what is in it, and that it is what training one by one gives."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffward.commands.main import main
from diffward.data import load_pictures
from diffward.errors import InputError
from diffward.finetune import Settings
from diffward.finetune.many import Job, train_many
from diffward.inversion.build import locked
from diffward.inversion.zoo import Zoo
from diffward.models.features import Features
from tests.finetune.test_many import assert_alike
from tests.inversion.conftest import contents, seeds
from tests.membership.test_shadow import FakeRay

MANIFEST = "manifest.parquet"


# --- one at a time, and the same zoo ---------------------------------------------------------------


def test_a_second_builder_is_told(build, tmp_path, trained, base_folder, faces, capsys):
    folder = tmp_path / "zoo"
    with locked(folder):
        with pytest.raises(InputError, match="another zoo build is at work there"):
            build(folder)
        command = ["zoo", "build", "--out", folder, "--base", base_folder, "--subjects", faces]
        with pytest.raises(SystemExit) as stop:
            main([*map(str, command), "--count", "2"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert trained == [] and not (folder / "zoo.json").exists()
    with locked(folder):  # free again
        pass


def test_a_zoo_grows(build, straight, tmp_path, trained):
    build(tmp_path / "zoo", count=3)
    assert {row.lora for row in Zoo(tmp_path / "zoo").rows} == {0, 1, 2}
    trained.clear()
    build(tmp_path / "zoo")
    assert trained == [seeds(straight, 1)]
    assert contents(tmp_path / "zoo") == contents(straight.folder)
    ragged = build(tmp_path / "ragged", count=2)
    with pytest.raises(InputError, match="its last shard is not full"):
        build(ragged.folder, count=6)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"seed": 4}, "another seed"),
        ({"per_shard": 6}, "another per_shard"),
        ({"test_share": 0.2}, "another test_share"),
        ({"count": 3}, "another larger count"),
        ({"ranges": {"steps": "3:7"}}, "another ranges"),
        ({"ranges": {"targets": "to_k"}}, "another ranges, modules"),
    ],
)
def test_another_zoo_is_not_mixed_in(build, zoo_copy, small_ranges, trained, change, told):
    before = contents(zoo_copy), (zoo_copy / MANIFEST).read_bytes()
    if "ranges" in change:
        change = {"ranges": replace(small_ranges, **change["ranges"])}
    with pytest.raises(InputError, match=f"is a zoo with {told}; choose another --out"):
        build(zoo_copy, **change)
    assert trained == [] and before == (contents(zoo_copy), (zoo_copy / MANIFEST).read_bytes())


@pytest.mark.parametrize("there", [False, True])
def test_without_pyarrow(build, zoo_copy, tmp_path, trained, monkeypatch, there):
    """Said before anything is trained, and not as if the manifest were broken."""
    for name in [n for n in sys.modules if n.split(".")[0] == "pyarrow"] + ["pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError) as told:
        build(zoo_copy if there else tmp_path / "zoo")
    assert str(told.value) == "a zoo's manifest needs pyarrow (pip install diffward[zoo])"
    assert trained == []
    if there:
        with pytest.raises(InputError, match=r"^a zoo's manifest needs pyarrow"):
            Zoo(zoo_copy)


# --- what is in it ---------------------------------------------------------------------------------


def test_the_rows(straight, small_ranges):
    by_lora = {n: [row for row in straight.rows if row.lora == n] for n in range(6)}
    assert [row.place for row in straight.rows if row.shard == 1] == list(range(len(straight) - by_lora[3][0].place - sum(len(by_lora[n]) for n in range(3))))  # fmt: skip
    for lora, rows in by_lora.items():
        assert {(row.shard, row.identity) for row in rows} == {(lora // 3, lora % 4)}
        whole = rows[0].recipe["steps"]
        # Halves, rounded to even: Python's way.
        assert [row.step for row in rows] == [{3: 2, 4: 2, 5: 2, 6: 3}[whole], whole]
        assert all(row.recipe == rows[0].recipe and row.label == () for row in rows)
    assert straight.last_saves(straight.rows) == [rows[-1] for rows in by_lora.values()]
    assert straight.head.base == "tiny" and straight.head.attributes == {}
    ends = {name.split(".", 1)[1].rsplit(".", 1)[-1] for name in straight.head.modules}
    assert ends == {"to_k", "to_v", "conv1"}


def test_all_saves_of_a_subject_are_on_one_side(straight):
    sides = {}
    for row in straight.rows:
        sides.setdefault(row.identity, set()).add(row.split)
    assert all(len(side) == 1 for side in sides.values()) and len(sides) == 4
    parts = [straight.of_split(name) for name in ("train", "valid", "test")]
    assert sum(map(len, parts)) == len(straight) and parts[0]
    for head in (straight.head, replace(straight.head, count=900, per_shard=7)):
        found = [head.split(i) for i in range(4000)]
        shares = [found.count(name) / 4000 for name in ("test", "valid", "train")]
        assert shares == pytest.approx([0.3, 0.15, 0.55], abs=0.03)  # four standard deviations
        assert all(head.split(i) in side for i, side in sides.items())


@pytest.mark.parametrize("lora", range(6))
def test_each_is_what_training_it_alone_gives(straight, tiny_denoiser, faces, lora):
    """From the manifest's row, the pictures and the captions as one would write them down."""
    rows = [row for row in straight.rows if row.lora == lora]
    recipe, denoiser = rows[0].recipe, tiny_denoiser()
    folder = faces / f"person {lora % 4}"
    known = load_pictures(folder)
    half = sorted(range(3), key=lambda i: known[i].sha256)[::2]
    order = np.random.default_rng([lora % 4, 1, lora]).permutation(half)
    assert 1 <= recipe["pictures"] <= 2  # as many as there are
    pictures = [known[i] for i in order[: recipe["pictures"]]]
    captions = []
    for picture in pictures:
        own = recipe["template"] == "captions" and (picture.caption or "{name}")
        captions.append((own or recipe["template"]).replace("{name}", recipe["word"]))
    features = Features(
        denoiser.encode(np.stack([p.load(16) for p in pictures])), captions, captions,
        denoiser.condition(captions), torch.arange(len(captions)),
    )  # fmt: skip
    settings = Settings(
        batch=2, targets="to_k,to_v,conv1",
        **{k: v for k, v in recipe.items() if k not in ("pictures", "template", "word")},
    )  # fmt: skip
    after = {}
    train_many(
        denoiser, [Job(features, settings)], on_step=lambda n, a: after.update({n: a.weights(0)})
    )
    for row in rows:
        assert_alike(straight.lora(row), after[row.step], 5e-3)
        tensors = straight.lora(row).modules.values()
        assert {m.rank for m in tensors} == {recipe["rank"]} and all(
            m.alpha == recipe["alpha"] for m in tensors
        )


def test_readers_agree(straight):
    """Row by row and shard by shard; rows asked for in any order."""
    rows = straight.rows[::-2] + straight.rows[::-3]
    seen = []
    for numbers, tensors in straight.shards(rows):
        for i, number in enumerate(numbers):
            for name, module in straight.lora(rows[number]).modules.items():
                assert torch.equal(tensors[f"{name}.down"][i], module.tensors["down"])
                assert torch.equal(tensors[f"{name}.up"][i], module.tensors["up"])
                assert float(tensors[f"{name}.scale"][i]) == pytest.approx(module.scale, rel=1e-6)
        seen += numbers
    assert sorted(seen) == list(range(len(rows)))


def test_another_zoo_in_its_place_is_read_anew(build, zoo_copy, tmp_path):
    row = Zoo(zoo_copy).rows[0]
    old = Zoo(zoo_copy).lora(row)
    other = build(tmp_path / "other", seed=4, count=3)
    shutil.rmtree(zoo_copy)
    other.folder.rename(zoo_copy)
    new, name = Zoo(zoo_copy), next(iter(old.modules))
    fresh = new.lora(new.rows[0]).modules[name].tensors["down"]
    truth = load_file(zoo_copy / "shards" / "shard-00000.safetensors")[f"{name}.down"][0].float()
    assert torch.equal(fresh, truth)
    assert not torch.equal(fresh, old.modules[name].tensors["down"])


# --- elsewhere -------------------------------------------------------------------------------------


def test_a_cluster_makes_the_same_zoo(build, straight, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ray := FakeRay())
    build(tmp_path / "zoo", cluster="ray")
    assert ray.tasks == 2 and ray.options == {"num_gpus": 0}
    assert contents(tmp_path / "zoo") == contents(straight.folder)


@pytest.mark.slow
def test_two_processes_make_the_same_zoo(build, straight, tmp_path):
    build(tmp_path / "zoo", workers=2)
    assert_alike_zoos(tmp_path / "zoo", straight.folder)


@pytest.mark.slow
def test_real_ray_makes_the_same_zoo(build, straight, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install diffward[cluster])")
    try:
        build(tmp_path / "zoo", cluster="ray")
    finally:
        ray.shutdown()
    assert_alike_zoos(tmp_path / "zoo", straight.folder)


def assert_alike_zoos(folder, other):
    """Processes may add up in another order."""
    ours, theirs = Zoo(folder), Zoo(other)
    assert ours.rows == theirs.rows
    for row in ours.rows:
        a, b = ours.lora(row), theirs.lora(row)
        for name, module in a.modules.items():
            for role, tensor in module.tensors.items():
                torch.testing.assert_close(tensor, b.modules[name].tensors[role], atol=2e-3, rtol=0)
