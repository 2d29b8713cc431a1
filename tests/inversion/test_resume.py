"""A zoo that was stopped anywhere and taken up again is bit for bit the one that was never stopped."""

from __future__ import annotations

import pytest

import diffward.inversion.build as building
from diffward.errors import InputError
from diffward.finetune import METHODS
from diffward.finetune.lion import Lion
from diffward.finetune.stacked_adamw import StackedAdamW
from diffward.inversion.zoo import Zoo
from tests.inversion.conftest import contents, seeds


def stop_on_call(monkeypatch, owner, name, number, after=False):
    """Let call `number` (from 1) of owner.name be interrupted: before it does anything, or after all.

    Gives the list of its calls.
    """
    whole, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number and not after:
            raise KeyboardInterrupt
        answer = whole(*arguments, **options)
        if len(calls) == number:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(owner, name, stopping)
    return calls


def steps_of(zoo, shard):
    return max(row.step for row in zoo.rows if row.shard == shard)


def optimizer_of(zoo, shard):
    (name,) = {row.recipe["optimizer"] for row in zoo.rows if row.shard == shard}
    return Lion if name == "lion" else StackedAdamW


# --- stopped, and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["first", "third", "last", "of the second shard"])
def test_stopped_within_a_step(build, straight, tmp_path, trained, step):
    first = steps_of(straight, 0)
    call = {"first": 1, "third": 3, "last": first, "of the second shard": first + 2}[step]
    with pytest.MonkeyPatch.context() as patch:
        stop_on_call(patch, METHODS["plain"].obj, "loss", call)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "zoo")
    rows = Zoo(tmp_path / "zoo").rows
    assert {row.shard for row in rows} == ({0} if call > first else set())
    trained.clear()
    with pytest.MonkeyPatch.context() as patch:
        passes = stop_on_call(patch, METHODS["plain"].obj, "loss", 10**9)
        build(tmp_path / "zoo")
    assert trained == [seeds(straight, s) for s in ((1,) if call > first else (0, 1))]
    assert len(passes) == first + steps_of(straight, 1) - (call - 1)  # no step is made twice
    assert contents(tmp_path / "zoo") == contents(straight.folder)
    assert not (tmp_path / "zoo" / "partial").exists()


def test_stopped_within_the_optimizer(build, straight, tmp_path):
    """Half a step is thrown away: nothing of it may reach a save."""
    with pytest.MonkeyPatch.context() as patch:
        stop_on_call(patch, optimizer_of(straight, 0), "step", 3, after=True)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "zoo")
    build(tmp_path / "zoo")
    assert contents(tmp_path / "zoo") == contents(straight.folder)


@pytest.mark.parametrize("save, after", [(1, False), (3, True), (6, False)])
def test_stopped_while_a_save_is_written(build, straight, tmp_path, save, after):
    """The checkpoint may then be past a save that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        stop_on_call(patch, building, "_write_save", save, after)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "zoo")
    build(tmp_path / "zoo")
    assert contents(tmp_path / "zoo") == contents(straight.folder)


@pytest.mark.parametrize("place", ["_join", "write_manifest"])
@pytest.mark.parametrize("after", [False, True])
def test_stopped_at_the_end_of_a_shard(build, straight, tmp_path, trained, place, after):
    with pytest.MonkeyPatch.context() as patch:
        stop_on_call(patch, building, place, 1, after)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "zoo")
    trained.clear()
    build(tmp_path / "zoo")
    assert contents(tmp_path / "zoo") == contents(straight.folder)
    if place == "write_manifest" and after:
        assert trained == [seeds(straight, 1)]


def test_stopped_again_and_again(build, straight, tmp_path):
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            stop_on_call(patch, METHODS["plain"].obj, "loss", 3)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "zoo")
    build(tmp_path / "zoo")
    assert contents(tmp_path / "zoo") == contents(straight.folder)


def test_a_finished_zoo_is_left_alone(build, zoo_copy, trained):
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in zoo_copy.glob("shards/*")}
    assert len(build(zoo_copy).rows) == len(Zoo(zoo_copy))
    assert trained == []
    assert before == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in zoo_copy.glob("shards/*")}


# --- damage ----------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 0xFF
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [flip, cut, lambda file: file.unlink()])
def test_a_damaged_shard(build, straight, zoo_copy, trained, capsys, harm):
    assert Zoo(zoo_copy).damaged == []
    harm(zoo_copy / "shards" / "shard-00000.safetensors")
    zoo = Zoo(zoo_copy)
    assert zoo.damaged == [0]
    assert zoo.rows == [row for row in straight.rows if row.shard == 1] and len(zoo) > 0
    assert {row.shard for row in zoo.of_split("train", "valid", "test")} == {1}
    assert [n for numbers, _ in zoo.shards(zoo.rows) for n in numbers] == list(range(len(zoo)))
    capsys.readouterr()
    build(zoo_copy)
    assert "damaged shards are made anew: 0\n" in capsys.readouterr().out
    assert trained == [seeds(straight, 0)]
    assert Zoo(zoo_copy).damaged == [] and contents(zoo_copy) == contents(straight.folder)


@pytest.mark.parametrize("harm", [flip, cut])
def test_what_cannot_be_read_at_all(zoo_copy, harm):
    harm(zoo_copy / "manifest.parquet")
    with pytest.raises(InputError, match=r"manifest\.parquet: cannot be read .*delete it"):
        Zoo(zoo_copy)
    (zoo_copy / "zoo.json").write_text('{"schema": "diffward.zoo/1"')
    with pytest.raises(InputError, match="is no zoo"):
        Zoo(zoo_copy)
