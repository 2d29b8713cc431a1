"""Bases of every kind load to the same model; what is not a base is refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffward.errors import InputError
from diffward.models.load import load_base

from .single_file import ldm_checkpoint


def refused(base, match, **options) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_base(base, device="cpu", **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.fixture
def copy(base_folder, tmp_path) -> Path:
    return shutil.copytree(base_folder, tmp_path / "copy")


def look(denoiser):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        text = denoiser.condition(["a red cup"])
        pixels = torch.from_numpy(denoiser.decode(latents))
        return text, denoiser.predict(latents, torch.tensor([100]), text), pixels


def test_folder(base_folder, tiny_denoiser):
    denoiser = load_base(base_folder, device="cpu")
    assert denoiser.prediction_type == "epsilon" and denoiser.resolution == 16
    expected = tiny_denoiser()
    for ours, theirs in zip(look(denoiser), look(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert denoiser.unet_identity == expected.unet_identity
    assert load_base(str(base_folder), device="cpu", resolution=32).latent_shape == (4, 16, 16)


def test_v_prediction_folder(tiny_pipeline, tmp_path):
    tiny_pipeline("v_prediction").save_pretrained(tmp_path / "v")
    assert load_base(tmp_path / "v", device="cpu").prediction_type == "v_prediction"


def test_half_precision_folder_loads_as_fp32(tiny_pipeline, tiny_denoiser, tmp_path):
    tiny_pipeline().to(torch.float16).save_pretrained(tmp_path / "half")
    denoiser = load_base(tmp_path / "half", device="cpu")
    for component in (denoiser.unet, denoiser.vae, denoiser.text_encoder):
        assert {p.dtype for p in component.parameters()} == {torch.float32}
    for ours, theirs in zip(look(denoiser), look(tiny_denoiser()), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2, rtol=0)


def test_bf16_is_autocast(base_folder):
    denoiser = load_base(base_folder, device="cpu", precision="bf16")
    assert {p.dtype for p in denoiser.unet.parameters()} == {torch.float32}
    exact, rough = look(load_base(base_folder, device="cpu"))[1], look(denoiser)[1]
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file(base_folder, tiny_pipeline, tiny_denoiser, tmp_path, suffix):
    tensors = ldm_checkpoint(tiny_pipeline())
    path = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    denoiser = load_base(path, device="cpu", config=base_folder)
    expected = tiny_denoiser()
    for ours, theirs in zip(look(denoiser), look(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert denoiser.unet_identity == expected.unet_identity


def test_single_file_without_its_configuration(tiny_pipeline, tmp_path):
    save_file(ldm_checkpoint(tiny_pipeline()), tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "--base-config names a diffusers folder")


def test_broken_single_files(base_folder, tiny_pipeline, tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(ldm_checkpoint(tiny_pipeline()), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:5000])
    refused(cut, "cannot be loaded as a checkpoint", config=base_folder)
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "not a checkpoint")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(2)}, other)
    refused(other, "cannot be loaded as a checkpoint", config=base_folder)
    lacking = {
        k: v for k, v in ldm_checkpoint(tiny_pipeline()).items() if "input_blocks.1." not in k
    }
    save_file(lacking, tmp_path / "lacking.safetensors")
    refused(
        tmp_path / "lacking.safetensors", "cannot be loaded as a checkpoint", config=base_folder
    )


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
def test_a_pickle_that_would_run_code_is_refused(base_folder, tmp_path, suffix):
    sprung = tmp_path / "sprung"
    path = tmp_path / f"evil.{suffix}"
    torch.save({"state_dict": {"x": Trap(sprung)}}, path)
    refused(path, "cannot be loaded as a checkpoint", config=base_folder)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    refused(path, "cannot be loaded as a checkpoint", config=base_folder)
    assert not sprung.exists()
    pickle.loads(path.read_bytes())  # the trap does work
    assert sprung.exists()


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
)
def test_a_folder_with_such_a_pickle_is_refused(copy, tmp_path, part):
    sprung = tmp_path / "sprung"
    weights = copy / f"{part}.safetensors"
    assert weights.exists()
    weights.unlink()
    name = "text_encoder/pytorch_model.bin" if part.startswith("text") else f"{part}.bin"
    torch.save({"x": Trap(sprung)}, copy / name)
    refused(copy, "cannot be loaded")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"]
)
def test_truncated_weights(copy, part):
    weights = copy / f"{part}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(copy, "cannot be loaded")


def test_what_is_not_there(tmp_path, copy):
    refused(tmp_path / "nowhere", "no such file or folder")
    refused("./nowhere", "no such file or folder")
    refused("nowhere.safetensors", "no such file or folder")
    refused("nowhere", "no such file or folder")
    refused("someone/some-model-that-is-not-cached", "not in the local hub cache")
    (copy / "model_index.json").write_text("{")
    refused(copy, "not readable as JSON")
    (copy / "model_index.json").unlink()
    refused(copy, "no model_index.json")
    refused(tmp_path, "no model_index.json")


def test_a_folder_without_its_weights(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(copy, "cannot be loaded")


def test_other_families_are_refused(copy, base_folder, tiny_pipeline, tmp_path):
    index = copy / "model_index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "_class_name": "StableDiffusionXLPipeline"}))
    refused(copy, "is a StableDiffusionXLPipeline; supported are")
    inpainting = tiny_pipeline(in_channels=9)
    inpainting.save_pretrained(tmp_path / "inpainting")
    refused(tmp_path / "inpainting", "inpainting")
    # SDXL's UNet under a wrong class name, as a wrong index or a single file gives it.
    sdxl = tiny_pipeline(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    sdxl.save_pretrained(tmp_path / "sdxl")
    refused(tmp_path / "sdxl", "SDXL")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there(base_folder):
    with pytest.raises(InputError, match="--device cuda: not available here"):
        load_base(base_folder, device="cuda")


def test_bad_options(base_folder):
    with pytest.raises(InputError, match="--device toaster"):
        load_base(base_folder, device="toaster")
    refused(base_folder, "--precision fp8", precision="fp8")
    refused(base_folder, "resolution 33", resolution=33)


def test_a_tuned_base_is_saved_and_loaded(tiny_pipeline, tiny_denoiser, tmp_path):
    from diffusers import StableDiffusionPipeline

    denoiser = tiny_denoiser("v_prediction")
    with torch.no_grad():
        denoiser.unet.conv_out.bias += 0.1
        denoiser.text_encoder.final_layer_norm.bias += 0.1
    denoiser.save_pipeline(tmp_path / "tuned")
    StableDiffusionPipeline.from_pretrained(tmp_path / "tuned")  # plain diffusers loads it
    again = load_base(tmp_path / "tuned", device="cpu")
    assert again.prediction_type == "v_prediction"
    for ours, theirs in zip(look(again), look(denoiser), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
