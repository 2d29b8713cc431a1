"""Names of a base model, and what is said when the LoRA is for another."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from diffward.errors import InputError
from diffward.lora import LoraModule, LoraWeights, convert_lora, open_lora

from .helpers import factors, shapes_of, tiny_text, tiny_unet


def sd_shapes(cross: int, blocks=(320, 640, 1280, 1280), layers: int = 2, projected: bool = True):
    """Linear layers of the attention of an SD UNet, in diffusers' order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def transformer(stem: str, width: int) -> None:
        block = f"{stem}.transformer_blocks.0"
        shapes[f"{stem}.proj_in"] = (width, width, 1, 1)
        for attention, inner in (("attn1", width), ("attn2", cross)):
            shapes[f"{block}.{attention}.to_q"] = (width, width)
            shapes[f"{block}.{attention}.to_k"] = (width, inner)
            shapes[f"{block}.{attention}.to_v"] = (width, inner)
            shapes[f"{block}.{attention}.to_out.0"] = (width, width)
        shapes[f"{block}.ff.net.0.proj"] = (8 * width, width)
        shapes[f"{block}.ff.net.2"] = (width, 4 * width)

    for index, width in enumerate(blocks[:3]):
        for layer in range(layers):
            transformer(f"unet.down_blocks.{index}.attentions.{layer}", width)
    transformer("unet.mid_block.attentions.0", blocks[-1])
    for index, width in enumerate(reversed(blocks[:3])):
        for layer in range(layers + 1):
            transformer(f"unet.up_blocks.{index + 1}.attentions.{layer}", width)
    return shapes


def clip_shapes(width: int, layers: int):
    names = ("k_proj", "v_proj", "q_proj", "out_proj")
    return {
        f"text_encoder.encoder.layers.{index}.self_attn.{name}": (width, width)
        for index in range(layers)
        for name in names
    }


def lora_for(shapes, ends=("to_k",)) -> LoraWeights:
    modules = {
        name: LoraModule.of(name, *factors(shape[0], shape[1], 2, 0), 1.0)
        for name, shape in shapes.items()
        if name.endswith(ends)
    }
    return LoraWeights(modules, source="my.safetensors")


def test_wrong_base_is_named():
    sdxl = lora_for(sd_shapes(2048))
    with pytest.raises(InputError, match=r"looks like SDXL \(cross-attention width 2048\).*SD 1.x"):
        sdxl.resolve(sd_shapes(768))
    with pytest.raises(InputError, match=r"SD 1.x.*cross-attention width 64"):
        lora_for(sd_shapes(768)).resolve(sd_shapes(64))


def test_a_smaller_base_of_the_same_width():
    with pytest.raises(InputError, match="not in the base"):
        lora_for(sd_shapes(768)).resolve(sd_shapes(768, layers=1))
    with pytest.raises(InputError, match="differently built"):
        lora_for(sd_shapes(768)).resolve(sd_shapes(768, blocks=(32, 64, 96, 96)))


def test_text_model_level_and_kohya_names(weights):
    shapes = {
        name.replace("text_encoder.", "text_encoder.text_model."): module.weight_shape
        for name, module in weights.modules.items()
    }
    resolved = weights.resolve(shapes)
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in resolved.modules
    assert all(module.shape == shapes[name] for name, module in resolved.modules.items())


def test_linear_and_one_by_one_convolution_are_the_same():
    name = "unet.mid_block.attentions.0.proj_in"
    weights = LoraWeights({name: LoraModule.of(name, *factors(8, 6, 2, 0, 1), 1.0)})
    assert weights.resolve({name: (8, 6)}).modules[name].delta().shape == (8, 6)


def test_unknown_private_names_resolve_through_flattening(tmp_path):
    down, up = factors(8, 6, 2, 0)
    stem = "lora_unet_my_odd_name_0_sub_layer"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up},
        tmp_path / "odd.safetensors",
    )
    weights = open_lora(tmp_path / "odd.safetensors").load()
    assert list(weights.resolve({"unet.my_odd.name.0.sub_layer": (8, 6)}).modules) == [
        "unet.my_odd.name.0.sub_layer"
    ]


def test_published_lists_resolve(shared_lora, tmp_path):
    base = sd_shapes(1024) | clip_shapes(1024, 23)
    path = shared_lora / "cloneofsimo__contents__lora_kiriko.pt"
    weights = open_lora(path).load(dtype=None)
    assert weights.is_positional and weights.base_family == "sd2"
    resolved = weights.resolve(base)
    names = list(resolved.modules)
    assert names[0] == "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[-1] == "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    # In this file every fourth pair is dead: if the order is right, all are output projections.
    dead = {
        n.rsplit("transformer_blocks.0.")[1]
        for n, m in resolved.modules.items()
        if not m.tensors["up"].any()
    }
    assert dead == {"attn1.to_out.0", "attn2.to_out.0"}
    with pytest.raises(InputError, match=r"SD 2.x.*SD 1.x"):
        weights.resolve(sd_shapes(768))
    with pytest.raises(InputError, match="numbered"):
        convert_lora(path, "diffusers", tmp_path / "x.safetensors")
    convert_lora(path, "diffusers", tmp_path / "x.safetensors", module_shapes=base)
    assert set(open_lora(tmp_path / "x.safetensors").entries) == set(resolved.modules)
    text = open_lora(shared_lora / "cloneofsimo__contents__lora_kiriko.text_encoder.pt").load()
    assert next(iter(text.resolve(base).modules)).endswith("layers.0.self_attn.k_proj")


@pytest.mark.parametrize("name", ["analog_svd_rank4", "lora_disney"])
def test_published_numbered_files_resolve(shared_lora, name):
    path = shared_lora / f"cloneofsimo__example_loras__{name}.safetensors"
    weights = open_lora(path).load()
    resolved = weights.resolve(sd_shapes(768) | clip_shapes(768, 12))
    assert len(resolved.modules) == 192
    assert "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj" in resolved.modules


def test_published_lokr_has_the_shapes_of_sd1(shared_lora):
    """Against a real SD 1.x tree, made without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    weights = open_lora(shared_lora / "lycoris__lokr_dim4.safetensors").load()
    shapes = shapes_of("unet", unet)
    for module in weights.modules.values():
        if module.name.startswith("text_encoder"):
            shapes[module.name] = module.weight_shape
    resolved = weights.resolve(shapes)
    conv = resolved.modules["unet.down_blocks.0.resnets.0.conv1"]
    assert conv.delta().shape == (320, 320, 3, 3)


def test_tiny_models_match_their_own_names():
    shapes = shapes_of("unet", tiny_unet()) | shapes_of("text_encoder", tiny_text())
    weights = lora_for({n: s for n, s in shapes.items() if len(s) == 2}, ends=("to_k", "q_proj"))
    assert set(weights.resolve(shapes).modules) == set(weights.modules)
