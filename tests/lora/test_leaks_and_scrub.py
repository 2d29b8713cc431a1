"""What a header tells, and that it is gone afterwards, and that nothing else is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffward.errors import InputError
from diffward.lora import header_leaks, inspect_lora, open_lora, scrub_lora, write_lora
from diffward.lora.leak_rules import find_paths
from diffward.lora.policy import kept_value

HEADER = {
    "ss_tag_frequency": json.dumps(
        {"10_anna": {"anna": 12, "red hair": 7, "a photo of anna at her home in the garden": 1}}
    ),
    "ss_dataset_dirs": json.dumps({"10_anna": {"n_repeats": 10, "img_count": 12}}),
    "ss_datasets": json.dumps(
        [
            {
                "subsets": [
                    {"image_dir": "anna_private", "img_count": 12, "class_tokens": "ohwx woman"}
                ]
            }
        ]
    ),
    "ss_bucket_info": json.dumps({"buckets": {"0": {"resolution": [512, 512], "count": 120}}}),
    "ss_num_train_images": "120",
    "ss_num_batches_per_epoch": "60",
    "ss_total_batch_size": "2",
    "ss_training_started_at": "1680716500.77",
    "ss_output_name": "anna_v3",
    "ss_training_comment": "for anna",
    "ss_session_id": "99",
    "ss_seed": "42",
    "modelspec.date": "2024-05-06T07:08:09",
    "modelspec.author": "Someone",
    "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 4000,
    "hostname": "studio-pc",
    "note": "D:\\training\\anna\\img",
    "cache": "/home/someone/pictures/anna",
    "sample": "a portrait of anna in her red coat at dusk",
    "weird": "zzz",
    "ot_config": json.dumps(
        {"concepts": [{"path": "C:\\Users\\me\\anna"}], "prompt": "anna smiling"}
    ),
    # These stay.
    "ss_network_module": "networks.lora",
    "ss_network_dim": "1",
    "ss_network_alpha": "1.0",
    "ss_network_args": json.dumps({"algo": "lokr", "conv_rank": "4", "preset": "/home/me/p.toml"}),
    "ss_base_model_version": "sd_v1",
    "ss_v2": "False",
    "ss_learning_rate": "0.0001",
    "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))",
    "ss_resolution": "(512, 512)",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.trigger_phrase": "ohwx woman",
    "format": "pt",
}
PRIVATE = ("anna", "Anna", "ohwx", "Someone", "studio", "home", "Users", "1680716500", "120", "zzz")


@pytest.fixture
def leaky(tmp_path):
    path = tmp_path / "leaky.safetensors"
    stem = "lora_unet_conv_in"
    save_file(
        {
            f"{stem}.lora_down.weight": torch.randn(1, 4),
            f"{stem}.lora_up.weight": torch.randn(4, 1),
        },
        path,
        HEADER,
    )
    return path


def test_every_leak_is_told_with_its_facts():
    leaks = {leak.key: leak for leak in header_leaks(HEADER)}
    expected = {
        "ss_tag_frequency": (
            "captions",
            "3 distinct training tags",
            "'anna' (12)",
            "whole captions",
        ),
        "ss_dataset_dirs": ("folders", "10_anna", "12 pictures", "repeated 10"),
        "ss_datasets": ("folders", "anna_private", "12 pictures", "ohwx woman"),
        "ss_bucket_info": ("counts", "120 pictures"),
        "ss_num_train_images": ("counts", "120 training pictures"),
        "ss_num_batches_per_epoch": ("counts", "60", "about 120"),
        "ss_training_started_at": ("times", "2023-04-05 17:41:40"),
        "ss_output_name": ("names", "anna_v3"),
        "ss_training_comment": ("captions", "for anna"),
        "modelspec.date": ("times", "2024-05-06"),
        "modelspec.author": ("names", "Someone"),
        "modelspec.thumbnail": ("pictures", "KB"),
        "modelspec.trigger_phrase": ("captions", "ohwx"),
        "hostname": ("names", "studio-pc"),
        "note": ("paths", "training"),
        "cache": ("paths", "/home/someone/pictures"),
        "sample": ("captions", "portrait of anna"),
        "ot_config": ("paths", "Users", "anna smiling"),
        "weird": ("unknown", "not checked"),
        "ss_seed": ("seeds", "42"),
        "ss_network_args": ("paths", "/home/me"),
    }
    for key, (category, *facts) in expected.items():
        assert leaks[key].category == category, leaks[key]
        assert all(fact in leaks[key].reveals for fact in facts), leaks[key]
    for key in ("ss_network_dim", "ss_learning_rate", "ss_optimizer", "format", "ss_v2"):
        assert key not in leaks
    assert all("\n" not in leak.reveals and len(leak.reveals) < 700 for leak in leaks.values())


def test_scrub_keeps_what_loaders_need_and_nothing_private(tmp_path, leaky):
    out = tmp_path / "clean.safetensors"
    result = scrub_lora(leaky, out)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    text = json.dumps(metadata)
    assert not [word for word in PRIVATE if word in text]
    assert json.loads(metadata["ss_network_args"]) == {"algo": "lokr", "conv_rank": "4"}
    for key in ("ss_network_dim", "ss_optimizer", "ss_resolution", "modelspec.architecture"):
        assert metadata[key] == HEADER[key]
    assert set(result.kept) == set(metadata)
    assert {leak.key for leak in result.removed} == (HEADER.keys() - metadata.keys()) | {
        "ss_network_args"
    }
    a, b = load_file(leaky), load_file(out)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert inspect_lora(out).leaks == []
    scrub_lora(out, tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == out.read_bytes()


def test_trigger_is_kept_only_when_asked(tmp_path, leaky):
    scrub_lora(leaky, tmp_path / "k.safetensors", keep_trigger=True)
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "ohwx woman"
        assert "ss_training_comment" not in file.metadata()


@pytest.mark.parametrize(
    "key, value",
    [
        ("ss_optimizer", "/home/me/optimizer.py"),
        ("ss_network_module", "C:\\code\\anna"),
        ("ss_base_model_version", "sd_v1 /data/anna"),
        ("ss_resolution", "512 pictures of anna"),
        ("ss_network_dim", "anna"),
        ("ss_sd_model_hash", "not a hash"),
        ("modelspec.implementation", "https://example.com/anna"),
        ("modelspec.architecture", "stable-diffusion-v1\nanna"),
        ("format", "anna"),
        ("unet", '["Attention", "/home/anna"]'),
        ("lora_adapter_metadata", "anna"),
        ("lora_adapter_metadata", '{"unet.base_model_name_or_path": "/home/anna"}'),
        ("lora_adapter_metadata", '{"unet.target_modules": "/home/anna"}'),
    ],
)
def test_a_kept_key_must_have_the_form_of_its_value(key, value):
    assert kept_value(key, value) is None
    assert key in {leak.key for leak in header_leaks({key: value})}


def test_paths():
    for text in (
        "/home/a/b",
        "C:\\x\\y",
        "d:/data/x",
        "\\\\server\\share",
        "~/pics/x",
        "../up/x",
        '{"p": "/mnt/data/x"}',
        "D:\\\\a\\\\b",
    ):
        assert find_paths(text), text
    for text in (
        "https://github.com/ostris/ai-toolkit",
        "1/2",
        "a/b",
        "stable-diffusion-v1/lora",
        "sd_1.5",
        "1girl, solo / smile",
        "and/or",
        "adamw(betas=(0.9, 0.99))",
    ):
        assert not find_paths(text), text


def test_refuses_to_overwrite_its_input(leaky):
    before = leaky.read_bytes()
    with pytest.raises(InputError, match="overwrite"):
        scrub_lora(leaky, leaky)
    assert leaky.read_bytes() == before


def test_pickles_are_sent_to_convert(tmp_path):
    torch.save([torch.zeros(8, 2), torch.zeros(2, 4)], tmp_path / "a.pt")
    with pytest.raises(InputError, match="convert"):
        scrub_lora(tmp_path / "a.pt", tmp_path / "b.pt")


def test_archive_name_of_a_pickle(tmp_path):
    torch.save([torch.zeros(8, 2), torch.zeros(2, 4)], tmp_path / "anna_secret.pt")
    (tmp_path / "anna_secret.pt").rename(tmp_path / "model.pt")
    (leak,) = inspect_lora(tmp_path / "model.pt").leaks
    assert "anna_secret" in leak.reveals


def test_peft_folder(tmp_path, weights):
    folder = tmp_path / "adapter"
    one = {n: m for n, m in weights.modules.items() if n.startswith("unet.")}
    weights.modules = one
    write_lora(weights, folder, "peft")
    assert inspect_lora(folder).leaks == []
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/someone/models/sd15"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("instance_prompt: a photo of anna\nsee /home/me/anna/x\n")
    (folder / "sample.png").write_bytes(b"x")
    keys = {leak.key for leak in inspect_lora(folder).leaks}
    assert keys == {"adapter_config.json:base_model_name_or_path", "README.md", "sample.png"}
    scrub_lora(folder, tmp_path / "clean")
    assert inspect_lora(tmp_path / "clean").leaks == []
    assert sorted(p.name for p in (tmp_path / "clean").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    a, b = open_lora(folder).load(), open_lora(tmp_path / "clean").load()
    assert all(a.modules[n].scale == b.modules[n].scale for n in a.modules)


def test_diffusers_file_loads_after_scrubbing(tmp_path, weights):
    write_lora(weights, tmp_path / "a.safetensors", "diffusers")
    scrub_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    a, b = (
        open_lora(tmp_path / "a.safetensors").load(),
        open_lora(tmp_path / "b.safetensors").load(),
    )
    assert all(a.modules[n].scale == b.modules[n].scale for n in a.modules)


def test_published_lokr(shared_lora, tmp_path):
    path, out = shared_lora / "lycoris__lokr_dim4.safetensors", tmp_path / "clean.safetensors"
    leaks = {leak.key: leak.reveals for leak in inspect_lora(path).leaks}
    assert "471 distinct training tags" in leaks["ss_tag_frequency"]
    assert "130 pictures" in leaks["ss_dataset_dirs"]
    scrub_lora(path, out)
    assert inspect_lora(out).leaks == []
    assert b"falcon" not in out.read_bytes() and b"ss_tag" not in out.read_bytes()
    a, b = load_file(path), load_file(out)
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
