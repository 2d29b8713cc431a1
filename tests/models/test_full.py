"""A full model on its base: the model itself while it is on, the base bit for bit while it is off."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffward.errors import InputError
from diffward.models.full import find_full
from diffward.models.saved import _text

from .single_file import ldm_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONV = "unet.mid_block.resnets.0.conv1.weight"


def tuned(pipe, text=True, share=3):
    """Every third tensor of the UNet moved, and one of the text encoder."""
    g = torch.Generator().manual_seed(7)
    names = []
    for index, (name, parameter) in enumerate(pipe.unet.named_parameters()):
        if index % share == 0:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
            names.append(f"unet.{name}")
    if text:
        name, parameter = next(iter(pipe.text_encoder.named_parameters()))
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=g)
        names.append(f"text_encoder.{name}")
    return names


@pytest.fixture(scope="module")
def full(tiny_pipeline, tmp_path_factory):
    """(folder of a tuned pipeline, names of what was tuned)."""
    pipe, folder = tiny_pipeline(), tmp_path_factory.mktemp("full") / "pipeline"
    names = tuned(pipe)
    pipe.save_pretrained(folder)
    return folder, names


def asked(denoiser):
    g = torch.Generator().manual_seed(1)
    latents, eps = torch.randn(2, 3, 4, 8, 8, generator=g)
    with torch.no_grad():
        text = denoiser.condition(["a red cup", "sks", ""])
        return torch.cat(
            [denoiser.errors(latents, torch.tensor([10, 400, 900]), eps, text).flatten(), text.flatten()]
        )  # fmt: skip


def bits(denoiser):
    return {
        f"{prefix}.{name}": parameter.data.clone()
        for prefix, component in denoiser.components().items()
        for name, parameter in component.named_parameters()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_single(folder, path):
    from diffusers import StableDiffusionPipeline

    tensors = ldm_checkpoint(StableDiffusionPipeline.from_pretrained(folder))
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        save_file(tensors, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("kind", ["pipeline", "unet", "model.safetensors", "model.ckpt"])
def test_on_is_the_model_as_diffusers_loads_it_and_off_the_base(
    full, kind, tiny_denoiser, tmp_path
):
    from diffusers import StableDiffusionPipeline

    from diffward.models.denoiser import Denoiser

    folder, names = full
    path = {"pipeline": folder, "unet": folder / "unet"}.get(kind)
    path = path or as_single(folder, tmp_path / kind)
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    denoiser = tiny_denoiser()
    if kind == "unet":  # the base's text encoder stays
        loaded.text_encoder = tiny_denoiser().text_encoder
        names = [name for name in names if name.startswith("unet.")]
    before, base, identity = bits(denoiser), asked(denoiser), denoiser.unet_identity
    swapped = find_full(path).attach(denoiser)
    assert set(swapped.changed) == set(names)
    assert swapped.parameters == sum(before[name].numel() for name in names)
    assert denoiser.adapts_text == (kind != "unet")
    expected = asked(Denoiser(loaded, "tuned"))
    assert torch.equal(asked(denoiser), expected) and not torch.allclose(base, expected)
    change = dict(swapped.changes())
    with denoiser.adapter(False):
        assert same(bits(denoiser), before) and torch.equal(asked(denoiser), base)
        with denoiser.adapter(True):
            after = bits(denoiser)
            assert all(torch.equal(after[n] - before[n], change[n]) for n in names)
    denoiser.detach()
    assert same(bits(denoiser), before) and denoiser.unet_identity == identity


def test_what_is_only_rounded_is_not_changed(tiny_pipeline, tiny_denoiser, tmp_path):
    pipe = tiny_pipeline()
    names = tuned(pipe, text=False, share=40)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    denoiser = tiny_denoiser()
    swapped = find_full(tmp_path / "half").attach(denoiser)
    assert set(swapped.changed) == set(names) and not denoiser.adapts_text
    own = dict(denoiser.unet.named_parameters())[names[0].removeprefix("unet.")]
    assert torch.equal(own, dict(pipe.unet.named_parameters())[names[0][5:]].float())
    denoiser.detach()
    tiny_pipeline().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    refused("nothing was fine-tuned", tmp_path / "base", denoiser)


def test_text_encoder_of_stable_diffusion_2_in_one_file(tiny_pipeline, tmp_path):
    """OpenCLIP's layout, against diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    g, prefix = torch.Generator().manual_seed(0), "cond_stage_model.model."
    shapes = {"positional_embedding": (12, 16), "token_embedding.weight": (30, 16), "ln_final.weight": (16,),
              "ln_final.bias": (16,), "text_projection": (16, 16), "logit_scale": ()}  # fmt: skip
    for layer in (0, 1, 23):
        at = f"transformer.resblocks.{layer}."
        shapes |= {f"{at}ln_{i}.{leaf}": (16,) for i in (1, 2) for leaf in ("weight", "bias")}
        shapes |= {f"{at}attn.in_proj_weight": (48, 16), f"{at}attn.in_proj_bias": (48,)}
        shapes |= {f"{at}attn.out_proj.weight": (16, 16), f"{at}attn.out_proj.bias": (16,)}
        shapes |= {f"{at}mlp.c_fc.weight": (24, 16), f"{at}mlp.c_fc.bias": (24,)}
        shapes |= {f"{at}mlp.c_proj.weight": (16, 24), f"{at}mlp.c_proj.bias": (16,)}
    tensors = {f"{prefix}{n}": torch.randn(s, generator=g) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    truth = convert_open_clip_checkpoint(tiny_pipeline().text_encoder, tensors)
    from diffward.lora.source import open_source

    found = _text([open_source(tmp_path / "x.safetensors")], (prefix,), "x")
    assert len(truth) == 2 * 16 + 4
    for name, tensor in truth.items():
        bare = name.removeprefix("text_model.")
        assert found.shape(bare) == tensor.shape and torch.equal(found[bare], tensor)


# --- wrong input -------------------------------------------------------------------------------------


def refused(words, path, denoiser):
    before = bits(denoiser)
    with pytest.raises(InputError) as error:
        find_full(path).attach(denoiser)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert same(bits(denoiser), before)


@pytest.fixture
def edited(full, tmp_path):
    def make(edit, part="unet", file=WEIGHTS):
        folder = shutil.copytree(full[0], tmp_path / f"edited{len(list(tmp_path.iterdir()))}")
        tensors = load_file(folder / part / file)
        edit(tensors)
        save_file(tensors, folder / part / file)
        return folder

    return make


def test_wrong_models(full, edited, base_folder, tiny_pipeline, denoiser, tmp_path):
    key = CONV.removeprefix("unet.")
    refused("nothing was fine-tuned", base_folder, denoiser)
    refused(f"has no tensor {CONV}", edited(lambda t: t.pop(key)), denoiser)
    refused(
        "1 tensors are not in the base (unet.extra …)",
        edited(lambda t: t.update(extra=torch.ones(2))),
        denoiser,
    )
    for value in (float("nan"), float("inf")):
        refused(f"{CONV} holds NaN", edited(lambda t, v=value: t[key].view(-1)[:1].fill_(v)), denoiser)  # fmt: skip
    refused("quantised", edited(lambda t: t.update({key: t[key].to(torch.int8)})), denoiser)
    wide = tmp_path / "wide"
    tiny_pipeline(block_out_channels=(16, 32)).save_pretrained(wide)
    refused("unet.conv_in.weight is 16 x 4 x 3 x 3, the base's 8 x 4 x 3 x 3", wide, denoiser)
    save_file(ldm_checkpoint(tiny_pipeline(block_out_channels=(16, 32))), tmp_path / "w.safetensors")  # fmt: skip
    refused("of another architecture", tmp_path / "w.safetensors", denoiser)
    # A word more in the vocabulary.
    key = next(k for k in load_file(full[0] / "text_encoder" / "model.safetensors") if "token_emb" in k)  # fmt: skip
    grown = edited(
        lambda t: t.update({key: torch.cat([t[key], t[key][:1]])}),
        "text_encoder",
        "model.safetensors",
    )
    refused("token_embedding.weight is", grown, denoiser)
    tiny_pipeline("v_prediction", seed=1).save_pretrained(tmp_path / "v")
    refused("predicts v_prediction, base tiny epsilon", tmp_path / "v", denoiser)


def test_a_tensor_is_read_once_and_none_to_check_names(full, denoiser, monkeypatch):
    from diffward.models.saved import Weights

    read, get = [], Weights.__getitem__
    monkeypatch.setattr(Weights, "__getitem__", lambda self, n: read.append(n) or get(self, n))
    find_full(full[0]).attach(denoiser)
    assert sorted(read) == sorted(bits(denoiser))


def test_what_is_a_full_model(full, base_folder, tmp_path):
    from ..guard.masked import lora_file

    lora = lora_file(tmp_path / "a.safetensors", {CONV.removesuffix(".weight"): (16, 16, 3, 3)})
    assert find_full(lora) is None and find_full(tmp_path / "nothing") is None
    assert find_full(base_folder / "vae") is None and find_full(base_folder / "text_encoder") is None  # fmt: skip
    assert find_full(tmp_path) is None
    model = find_full(full[0])
    assert [f.parent.name for f in model.files] == ["unet", "text_encoder"]
    assert model.base_family == "unet-16" and model.prediction_type == "epsilon"
    assert model.sha256 != find_full(full[0] / "unet").sha256
    shutil.copytree(full[0], tmp_path / "run" / "pipeline")
    with pytest.raises(InputError, match="the model lies in its folder pipeline"):
        find_full(tmp_path / "run")
    # Where an adapter lies in the folder too, that is what was meant.
    shutil.copy(lora, tmp_path / "run" / "pipeline" / "pytorch_lora_weights.safetensors")
    assert find_full(tmp_path / "run" / "pipeline") is None


def test_a_saved_pipeline_does_not_tell_where_its_base_lay(base_folder, tmp_path):
    from diffward.models.load import load_base

    denoiser = load_base(base_folder, device="cpu")
    denoiser.save_pipeline(tmp_path / "saved")
    files = [f for f in (tmp_path / "saved").rglob("*") if f.is_file()]
    assert not [f for f in files if str(base_folder).encode() in f.read_bytes()]
    config = json.loads((tmp_path / "saved" / "unet" / "config.json").read_text())
    assert config["block_out_channels"] == [8, 16]
    again = load_base(tmp_path / "saved", device="cpu")
    assert same(bits(again), bits(denoiser))
