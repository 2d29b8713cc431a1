"""Registry, files, errors: what every room stands on."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from diffward.errors import DiffwardError, InputError, TrainingError
from diffward.files import atomic_path, sha256_file, write_json, write_text
from diffward.registry import Registry


def test_exit_codes():
    assert [e("x").exit_code for e in (DiffwardError, InputError, TrainingError)] == [2, 2, 2]
    assert all(issubclass(e, DiffwardError) for e in (InputError, TrainingError))


def test_registry():
    registry: Registry = Registry("attack")

    @registry.register("one", paper="P", access="grey box", cost="1", queries=3)
    def one():
        """First line.

        More.
        """

    entry = registry["one"]
    assert entry.obj is one and entry.summary == "First line." and entry.paper == "P"
    assert entry.access == "grey box" and entry.cost == "1" and entry.extra == {"queries": 3}
    assert "one" in registry and "two" not in registry
    assert registry.names() == ["one"] and [e.name for e in registry] == ["one"]


def test_registry_clash_and_unknown_names():
    registry: Registry = Registry("attack")
    with pytest.raises(InputError, match="unknown attack 'x'; known: none"):
        registry["x"]
    registry.register("one")(lambda_with_docstring())
    with pytest.raises(ValueError, match="attack 'one' is registered twice"):
        registry.register("one")(lambda_with_docstring())
    with pytest.raises(ValueError, match="attack 'two' needs a docstring"):
        registry.register("two")(lambda: None)
    assert registry.names() == ["one"]
    with pytest.raises(InputError, match="unknown attack 'two'; known: one"):
        registry["two"]


def lambda_with_docstring():
    def thing():
        """Does it."""

    return thing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_half_written(tmp_path, error):
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert list((tmp_path / "deep").iterdir()) == []
    write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_is_that_of_a_plain_open(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_json_refuses_nan_and_leaves_nothing(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.json"]


def test_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
