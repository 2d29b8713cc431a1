"""Whatever the bytes: a LoRA, or one clear line; nothing runs and nothing is half-written."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffward.errors import InputError
from diffward.lora import convert_lora, inspect_lora, open_lora, scrub_lora

STEM = "lora_unet_conv_in"


def refused(path, match: str) -> None:
    """Refused by all verbs, in one line that names the file, leaving nothing behind."""
    for verb in (
        open_lora,
        inspect_lora,
        lambda p: scrub_lora(p, path.parent / "out.safetensors"),
        lambda p: convert_lora(p, "kohya", path.parent / "out.safetensors"),
    ):
        before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
        with pytest.raises(InputError, match=match) as caught:
            verb(path)
        message = str(caught.value)
        assert "\n" not in message and path.name in message, message
        assert len(message) < 400
        assert (sorted(path.parent.iterdir()) if path.parent.is_dir() else []) == before


def raw_file(path, header, data: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def lora_header(**changes):
    header = {
        f"{STEM}.lora_down.weight": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]},
        f"{STEM}.lora_up.weight": {"dtype": "F32", "shape": [4, 1], "data_offsets": [16, 32]},
    }
    header[f"{STEM}.lora_down.weight"].update(changes)
    return header


def test_missing(tmp_path):
    refused(tmp_path / "nothing.safetensors", "no such file")


def test_empty_file_and_folder(tmp_path):
    (tmp_path / "a.safetensors").touch()
    refused(tmp_path / "a.safetensors", "is empty")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no adapter in this folder")


def test_no_tensors(tmp_path):
    refused(raw_file(tmp_path / "a.safetensors", {}), "holds no tensors")


def test_header_length_that_begins_like_a_pickle(tmp_path):
    """640 is 80 02: the first bytes of a pickle of protocol 2."""
    header = lora_header()
    pad = 640 - len(json.dumps({"__metadata__": {"x": ""}, **header}))
    path = raw_file(
        tmp_path / "a.safetensors", {"__metadata__": {"x": "y" * pad}, **header}, b"\0" * 32
    )
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert inspect_lora(path).modules == 1


def test_truncated(tmp_path, kohya_file):
    data = kohya_file.read_bytes()
    for cut in (4, 40, len(data) // 2, len(data) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(data[:cut])
        refused(path, "truncated|not a safetensors|lies")


@pytest.mark.parametrize("length", [10 * 2**30, 2**63, 2**64 - 1, 10_000])
def test_header_length_lies(tmp_path, length):
    refused(raw_file(tmp_path / "a.safetensors", lora_header(), b"\0" * 32, length), "claims")


@pytest.mark.parametrize(
    "header, match",
    [
        (b"not json at all!", "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"[" * 5000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        ({"x": 5}, "not a tensor description"),
        ({}, "belong to nothing"),
        ({"__metadata__": [1]}, "__metadata__"),
        (lora_header(dtype="F99"), "unknown dtype"),
        (lora_header(dtype=[]), "unknown dtype"),
        (lora_header(shape=[-1, 4]), "no valid shape"),
        (lora_header(shape=[True, 4]), "no valid shape"),
        (lora_header(shape=[2, 4]), "does not fill"),
        (lora_header(data_offsets=[16, 32]), "overlaps|unexplained"),
        (lora_header(data_offsets=[0, 99999]), "outside the file"),
        (lora_header(data_offsets=[16, 0]), "outside the file"),
        (lora_header(data_offsets="x"), "no valid data_offsets"),
        (lora_header(shape=[1, 2], data_offsets=[0, 8]), "unexplained bytes"),
    ],
)
def test_lying_headers(tmp_path, header, match):
    refused(raw_file(tmp_path / "a.safetensors", header, b"\0" * 32), match)


def test_hidden_data_after_the_last_tensor(tmp_path):
    refused(raw_file(tmp_path / "a.safetensors", lora_header(), b"\0" * 64), "belong to nothing")


def test_not_a_lora(tmp_path):
    full = {f"down_blocks.{i}.conv.weight": torch.zeros(2, 2) for i in range(4)}
    save_file(full, tmp_path / "full.safetensors")
    refused(tmp_path / "full.safetensors", "full checkpoint.*--base")
    save_file({"weights": torch.zeros(3)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "is not a LoRA")
    (tmp_path / "x.json").write_text('{"a": 1}' * 20)
    refused(tmp_path / "x.json", "JSON")


def test_incomplete_and_disagreeing_factors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({f"{STEM}.lora_down.weight": torch.zeros(2, 4)}, path)
    refused(path, "incomplete")
    save_file(
        {f"{STEM}.lora_down.weight": torch.zeros(2, 4), f"{STEM}.lora_up.weight": torch.ones(4, 3)},
        path,
    )
    refused(path, "do not fit together")


@pytest.mark.parametrize("key", ["x.oft_blocks", "x.diff", "x.lora_B.bias", "a.modules_to_save.b"])
def test_unsupported_adapters_are_named(tmp_path, key):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(2)}, path)
    refused(path, "not supported")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_names_the_tensor(tmp_path, bad, dtype):
    up = torch.ones(4, 1, dtype=dtype)
    up[2] = bad
    path = tmp_path / "a.safetensors"
    save_file(
        {f"{STEM}.lora_down.weight": torch.ones(1, 4, dtype=dtype), f"{STEM}.lora_up.weight": up},
        path,
    )
    for verb in (inspect_lora, lambda p: open_lora(p).load()):
        with pytest.raises(InputError, match=f"{STEM}.lora_up.weight.*NaN"):
            verb(path)


def test_large_finite_values_are_not_infinity(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(
        {
            f"{STEM}.lora_down.weight": torch.full((1, 4), 3e38),
            f"{STEM}.lora_up.weight": torch.ones(4, 1),
        },
        path,
    )
    inspect_lora(path)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_pickle_that_would_run_code(tmp_path):
    target = tmp_path / "owned"
    plain, archived = tmp_path / "plain.pt", tmp_path / "zip.pt"
    plain.write_bytes(pickle.dumps({"a": Evil(target)}, protocol=2))
    torch.save([torch.zeros(2, 1), Evil(target)], archived)
    for path in (plain, archived):
        refused(path, "would run code")
    assert not target.exists()


def test_broken_and_bloated_archives(tmp_path):
    path = tmp_path / "a.pt"
    torch.save([torch.zeros(20, 4), torch.zeros(4, 20)], path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    refused(path, "damaged")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    refused(path, "far more than its size")
    torch.save([torch.zeros(1).expand(10**9, 4), torch.zeros(4, 4)], path)
    refused(path, "larger than the file")
    torch.save({"a": 1}, path)
    refused(path, "no tensors")
    torch.save([torch.zeros(3, 2)], path)
    refused(path, "pairs")


def test_peft_folder_with_bad_config(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{")
    refused(folder, "adapter_model")
    key = "base_model.model.conv_in"
    save_file(
        {f"{key}.lora_A.weight": torch.zeros(1, 4), f"{key}.lora_B.weight": torch.zeros(4, 1)},
        folder / "adapter_model.safetensors",
    )
    for text, match in (
        ("{", "not valid JSON"),
        ('{"peft_type": "OFT"}', "OFT"),
        ('{"peft_type": "LORA", "lora_alpha": "x"}', "not a number"),
    ):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=match):
            open_lora(folder)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=300))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "fuzz.safetensors"
    for content in (data, struct.pack("<Q", len(data)) + data):
        path.write_bytes(content)
        with pytest.raises(InputError):
            inspect_lora(path)


def test_mutated_files(tmp_path, kohya_file):
    """Flip bytes of a good file: it is read, or refused in one line, and never takes long."""
    good = kohya_file.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    random = np.random.default_rng(0)
    path = tmp_path / "mutant.safetensors"
    read = 0
    for _ in range(400):
        data = bytearray(good)
        for position in random.integers(0, 8 + length, random.integers(1, 4)):
            data[position] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            inspect_lora(path)
            read += 1
        except InputError as error:
            assert "\n" not in str(error)
    assert read < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    metadata=st.dictionaries(
        st.sampled_from(
            [
                "ss_tag_frequency",
                "ss_dataset_dirs",
                "ss_datasets",
                "ss_bucket_info",
                "ss_num_train_images",
                "ss_network_args",
                "lora_adapter_metadata",
                "modelspec.date",
                "ss_training_started_at",
                "software",
                "training_info",
                "thing",
                "ss_num_batches_per_epoch",
                "ss_batch_size_per_device",
            ]
        ),
        json_values | st.text(max_size=20),
    )
)
def test_any_metadata(tmp_path, metadata):
    """Header values are whatever somebody wrote."""
    path = tmp_path / "meta.safetensors"
    raw_file(path, {"__metadata__": metadata, **lora_header()}, b"\0" * 32)
    for verb in (inspect_lora, lambda p: scrub_lora(p, tmp_path / "o.safetensors")):
        try:
            verb(path)
        except InputError as error:
            assert "adapter" in str(error)


def test_mutated_pickles(tmp_path):
    path = tmp_path / "mutant.pt"
    torch.save([torch.randn(6, 2), torch.randn(2, 4)], path)
    good = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(good)
        for position in random.integers(0, len(data), random.integers(1, 6)):
            data[position] = random.integers(0, 256)
        path.write_bytes(data)
        try:
            inspect_lora(path)
        except InputError as error:
            assert "\n" not in str(error)
