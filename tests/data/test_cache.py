"""Values are computed once, come back bit for bit in the order asked, and survive damage."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from diffward.data import FeatureCache, cache_root
from diffward.errors import InputError


class Encoder:
    """Counts what it is asked for; the value of a key is a function of the key alone."""

    def __init__(self, keys: list[str], dtype: torch.dtype = torch.float32) -> None:
        self.keys, self.dtype, self.asked = keys, dtype, []

    def __call__(self, indices: list[int]) -> torch.Tensor:
        self.asked.append(indices)
        return torch.stack([value(self.keys[i], self.dtype) for i in indices])


def value(key: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(key.encode()) * 31 + len(key))
    return torch.randn(2, 3, generator=generator).to(dtype)


def expected(keys: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.stack([value(key, dtype) for key in keys])


KEYS = [f"picture {i}" for i in range(7)]


@pytest.mark.parametrize("on_disk", [True, False])
def test_computed_once_in_batches_and_in_order(tmp_path, on_disk):
    cache = FeatureCache(tmp_path if on_disk else None, "latents")
    encode = Encoder(KEYS)
    assert torch.equal(cache.get_or_compute(KEYS, encode, 3), expected(KEYS))
    assert encode.asked == [[0, 1, 2], [3, 4, 5], [6]]
    mixed = [KEYS[5], "new", KEYS[0], KEYS[5]]
    encode = Encoder(mixed)
    assert torch.equal(cache.get_or_compute(mixed, encode, 3), expected(mixed))
    assert encode.asked == [[1]]
    assert KEYS[3] in cache and "other" not in cache
    assert cache.size()[0] == 8


def test_another_process_finds_it(tmp_path):
    FeatureCache(tmp_path, "latents").get_or_compute(KEYS, Encoder(KEYS), 4)
    encode = Encoder(KEYS)
    again = FeatureCache(tmp_path, "latents").get_or_compute(KEYS[::-1], encode, 4)
    assert encode.asked == [] and torch.equal(again, expected(KEYS[::-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_exact(tmp_path, dtype):
    FeatureCache(tmp_path, "n").get_or_compute(KEYS, Encoder(KEYS, dtype), 4)
    back = FeatureCache(tmp_path, "n").get_or_compute(KEYS, Encoder(KEYS), 4)
    assert back.dtype == dtype and torch.equal(back, expected(KEYS, dtype))


def test_special_values_numpy_and_scalars(tmp_path):
    odd = np.array([np.nan, np.inf, -0.0, 1e-45], dtype=np.float32)
    FeatureCache(tmp_path, "n").get_or_compute(list("abcd"), lambda i: odd[i], 3)
    back = FeatureCache(tmp_path, "n").get_or_compute(list("abcd"), lambda i: odd[i] * 0, 3)
    assert back.shape == (4,) and back.numpy().tobytes() == odd.tobytes()


def test_namespaces_do_not_mix(tmp_path):
    one, two = FeatureCache(tmp_path, "base a/512"), FeatureCache(tmp_path, "base b/512")
    one.get_or_compute(KEYS, Encoder(KEYS), 4)
    zeros = two.get_or_compute(KEYS, lambda i: torch.zeros(len(i), 2, 3), 4)
    assert not zeros.any()
    two.clear()
    assert two.size() == (0, 0) and one.size()[0] == 7 and one.size()[1] > 0
    encode = Encoder(KEYS)
    two.get_or_compute(KEYS, encode, 7)
    assert encode.asked == [list(range(7))]


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "bits", "header", "empty", "junk", "huge header"])
def test_damage_is_computed_again(tmp_path, damage):
    FeatureCache(tmp_path, "n").get_or_compute(KEYS, Encoder(KEYS), 4)
    victim = shards(tmp_path)[0]
    data = bytearray(victim.read_bytes())
    if damage == "truncated":
        data = data[: len(data) - 10]
    elif damage == "bits":  # every value of the shard, and nothing that the format checks
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(byte ^ 1 for byte in data[start:])
    elif damage == "header":
        data[20:40] = b"\xff" * 20
    elif damage == "huge header":
        data[:8] = (2**62).to_bytes(8, "little")
    else:
        data = bytearray(b"" if damage == "empty" else b"junk that is no shard")
    victim.write_bytes(data)
    encode = Encoder(KEYS)
    again = FeatureCache(tmp_path, "n").get_or_compute(KEYS, encode, 2)
    assert torch.equal(again, expected(KEYS))
    assert sum(map(len, encode.asked)) in (3, 4), "only what the shard held"
    encode = Encoder(KEYS)
    healed = FeatureCache(tmp_path, "n").get_or_compute(KEYS, encode, 2)
    assert encode.asked == [] and torch.equal(healed, expected(KEYS)), "and it stays healed"


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def fail(indices: list[int]) -> torch.Tensor:
        if 4 in indices:
            raise KeyboardInterrupt
        return torch.zeros(len(indices), 2)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, "n").get_or_compute(KEYS, fail, 2)
    cache = FeatureCache(tmp_path, "n")
    assert cache.size()[0] == 4, "whole batches before it are kept"
    assert all(path.suffix == ".safetensors" for path in cache.folder.iterdir())


def work(root: Path, order: int) -> None:
    keys = [f"picture {i}" for i in range(40)][::order]
    for _ in range(3):
        got = FeatureCache(root, "n").get_or_compute(keys, Encoder(keys), 3)
        assert torch.equal(got, expected(keys))


def test_two_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(tmp_path, order)) for order in (1, -1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    encode = Encoder([f"picture {i}" for i in range(40)])
    FeatureCache(tmp_path, "n").get_or_compute(encode.keys, encode, 3)
    assert encode.asked == []


def test_file_names_tell_nothing(tmp_path):
    keys = ["private/grandma.jpg", "a photo of grandma"]
    FeatureCache(tmp_path, "latents/grandma-base").get_or_compute(keys, Encoder(keys), 2)
    for path in tmp_path.rglob("*"):
        assert "grandma" not in path.name
        assert not path.is_file() or b"grandma" not in path.read_bytes()


def test_misuse_and_unwritable(tmp_path):
    cache = FeatureCache(tmp_path, "n")
    with pytest.raises(ValueError, match="no keys"):
        cache.get_or_compute([], Encoder([]), 1)
    with pytest.raises(ValueError, match="batch_size"):
        cache.get_or_compute(["a"], Encoder(["a"]), 0)
    with pytest.raises(ValueError, match="1 values for 2"):
        cache.get_or_compute(["a", "b"], lambda i: torch.zeros(1, 2), 2)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="DIFFWARD_CACHE"):
        FeatureCache(tmp_path / "file", "n").get_or_compute(["a"], Encoder(["a"]), 1)


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFWARD_CACHE", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x"
    monkeypatch.delenv("DIFFWARD_CACHE")
    assert cache_root() == Path.home() / ".cache" / "diffward"
