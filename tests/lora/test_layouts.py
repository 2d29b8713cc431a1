"""Every layout gives the same modules and the same change of weights; round trips lose nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffward.errors import InputError
from diffward.lora import (
    LoraModule,
    convert_lora,
    family_of_width,
    inspect_lora,
    open_lora,
    write_lora,
)
from diffward.lora.names import from_kohya, from_ldm, to_kohya, unflatten

from .helpers import BLOCK, factors


def same(ours, theirs) -> None:
    assert set(ours.modules) == set(theirs.modules)
    for name, module in ours.modules.items():
        other = theirs.modules[name]
        assert module.scale == pytest.approx(other.scale, rel=1e-7), name
        for role, tensor in module.tensors.items():
            assert torch.equal(tensor, other.tensors[role]), (name, role)


def old_diffusers(weights, path) -> None:
    """Attention processors with `_lora`, text encoder with `lora_linear_layer`; no alpha."""
    tensors = {}
    for name, module in weights.modules.items():
        component, rest = name.split(".", 1)
        if component == "text_encoder":
            stem = f"text_encoder.text_model.{rest}.lora_linear_layer"
        elif ".attn" in rest:
            head, _, tail = rest.partition(".to_")
            stem = f"unet.{head}.processor.to_{tail.removesuffix('.0')}_lora"
        else:
            stem = f"unet.{rest}.lora"
        tensors[f"{stem}.down.weight"] = module.tensors["down"]
        tensors[f"{stem}.up.weight"] = module.tensors["up"]
    save_file(tensors, path)


def test_kohya_by_hand(weights, kohya_file):
    file = open_lora(kohya_file)
    assert (file.format, file.kind, file.base_family) == ("kohya", "locon", "sd1")
    loaded = file.load()
    assert set(loaded.modules) == set(weights.modules)
    for name, module in weights.modules.items():
        up, down = module.tensors["up"], module.tensors["down"]
        naive = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
        naive = naive * module.alpha / down.shape[0]
        delta = loaded.modules[name].delta()
        assert delta.shape == (up.shape[0], *down.shape[1:])
        assert torch.allclose(delta.flatten(1), naive, atol=1e-6)


def test_old_diffusers(tmp_path, weights):
    old_diffusers(weights, tmp_path / "old.safetensors")
    file = open_lora(tmp_path / "old.safetensors")
    assert file.format == "diffusers-old"
    assert set(file.entries) == set(weights.modules)
    assert all(module.scale == 1 for module in file.load().modules.values())


def test_unet_only_attention_processors(tmp_path):
    """The very first layout has no component at all."""
    down, up = factors(8, 768, 2, 0)
    key = f"{BLOCK}.attn2.processor.to_k_lora"
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"{key}.down.weight": down, f"{key}.up.weight": up}, path)
    assert list(open_lora(tmp_path).entries) == [f"unet.{BLOCK}.attn2.to_k"]


def test_comfyui(tmp_path):
    down, up = factors(8, 768, 2, 0)
    ldm = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    flux = "diffusion_model.double_blocks.0.img_attn.proj"
    clip = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    tensors = {}
    for key in (ldm, flux, clip):
        tensors[f"{key}.lora_A.weight"] = down.clone()
        tensors[f"{key}.lora_B.weight"] = up.clone()
    save_file(tensors, tmp_path / "comfy.safetensors")
    file = open_lora(tmp_path / "comfy.safetensors")
    assert file.format == "comfyui"
    assert set(file.entries) == {
        f"unet.{BLOCK}.attn2.to_k",
        "transformer.double_blocks.0.img_attn.proj",
        "text_encoder.encoder.layers.0.mlp.fc1",
    }


@pytest.mark.parametrize("first", ["diffusers", "peft", "kohya"])
@pytest.mark.parametrize("second", ["diffusers", "peft", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip(tmp_path, weights, first, second, dtype):
    for name, module in weights.modules.items():
        tensors = {role: tensor.to(dtype) for role, tensor in module.tensors.items()}
        weights.modules[name] = LoraModule(name, module.kind, tensors, module.alpha, module.rank)
    names = {"diffusers": "a.safetensors", "kohya": "b.safetensors", "peft": "c"}
    one, two, three = (
        tmp_path / step / names[fmt] for step, fmt in zip("123", (first, second, first))
    )
    write_lora(weights, one, first)
    convert_lora(one, second, two)
    convert_lora(two, first, three)
    same(weights, open_lora(two).load(dtype=None))
    same(weights, open_lora(three).load(dtype=None))
    if first != "peft":
        a, b = load_file(one), load_file(three)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    if first == second != "peft":
        assert one.read_bytes() == three.read_bytes()


def test_no_metadata_of_the_data_is_written(tmp_path, weights, kohya_file):
    convert_lora(kohya_file, "diffusers", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "secret" not in json.dumps(file.metadata())
    write_lora(
        weights, tmp_path / "k.safetensors", "kohya", {"ss_dataset_dirs": "x", "ss_seed": "1"}
    )
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        assert not {"ss_dataset_dirs", "ss_seed"} & file.metadata().keys()


def loha(out, inner, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hada_w1_a": (out, rank),
        "hada_w1_b": (rank, inner),
        "hada_w2_a": (out, rank),
        "hada_w2_b": (rank, inner),
    }
    return {role: torch.randn(shape, generator=generator) for role, shape in shapes.items()}


LYCORIS = {
    "loha": lambda: loha(8, 768, 2, 0),
    "lokr": lambda: {
        "lokr_w1": torch.randn(2, 4),
        "lokr_w2_a": torch.randn(4, 1),
        "lokr_w2_b": torch.randn(1, 192),
    },
    "lokr-full": lambda: {"lokr_w1": torch.randn(2, 4), "lokr_w2": torch.randn(4, 192)},
    "locon-tucker": lambda: {
        "lora_down.weight": torch.randn(2, 6, 1, 1),
        "lora_mid.weight": torch.randn(2, 2, 3, 3),
        "lora_up.weight": torch.randn(8, 2, 1, 1),
    },
    "loha-tucker": lambda: {
        "hada_t1": torch.randn(2, 2, 3, 3),
        "hada_w1_a": torch.randn(2, 8),
        "hada_w1_b": torch.randn(2, 6),
        "hada_t2": torch.randn(2, 2, 3, 3),
        "hada_w2_a": torch.randn(2, 8),
        "hada_w2_b": torch.randn(2, 6),
    },
    "lokr-tucker": lambda: {
        "lokr_w1": torch.randn(2, 3),
        "lokr_t2": torch.randn(2, 2, 3, 3),
        "lokr_w2_a": torch.randn(2, 4),
        "lokr_w2_b": torch.randn(2, 2),
    },
}


def naive(kind, t, alpha):
    """The formulas, written out with loops and sums."""
    if kind == "loha":
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * alpha / 2
    if kind == "lokr":
        return torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]) * alpha
    if kind == "lokr-full":
        return torch.kron(t["lokr_w1"], t["lokr_w2"])  # alpha is ignored

    def tucker(core, a, b):
        w = torch.zeros(a.shape[1], b.shape[1], 3, 3)
        for i in range(2):
            for j in range(2):
                w += a[i][:, None, None, None] * b[j][None, :, None, None] * core[i, j]
        return w

    if kind == "locon-tucker":
        a, b = t["lora_up.weight"].flatten(1).T, t["lora_down.weight"].flatten(1)
        return tucker(t["lora_mid.weight"], a, b) * alpha / 2
    if kind == "loha-tucker":
        return (
            tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"])
            * tucker(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
            * alpha
            / 2
        )
    w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    rows = [torch.cat([x * w2 for x in row], dim=1) for row in t["lokr_w1"]]
    return torch.cat(rows, dim=0) * alpha / 2


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris(tmp_path, kind):
    torch.manual_seed(4)
    tensors = LYCORIS[kind]()
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    saved = {f"{module}.{role}": tensor for role, tensor in tensors.items()}
    path = tmp_path / "lycoris.safetensors"
    save_file({**saved, f"{module}.alpha": torch.tensor(0.5)}, path)
    file = open_lora(path)
    assert file.kind == kind.split("-")[0] and file.format == "kohya"
    (loaded,) = file.load().modules.values()
    expected = naive(kind, tensors, 0.5)
    assert torch.allclose(loaded.delta(), expected, atol=1e-5)
    report = inspect_lora(path).per_module[0]
    assert report.norm == pytest.approx(float(expected.norm()), rel=1e-4)
    values = torch.linalg.svdvals(expected.flatten(1).double())
    p = values / values.sum()
    p = p[p > 1e-12]
    assert report.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-3)
    again = tmp_path / "again.safetensors"
    convert_lora(path, "kohya", again)
    a, b = load_file(path), load_file(again)
    assert all(torch.equal(a[key], b[key]) for key in saved)
    with pytest.raises(InputError, match="kohya"):
        convert_lora(path, "diffusers", tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("kernel", [None, 3])
def test_dora_of_lycoris(tmp_path, axis, kernel):
    down, up = factors(8, 6, 2, 0, kernel)
    base = torch.randn(8, 6, *([kernel] * 2 if kernel else []))
    ones = [1] * (base.ndim - 1)
    scale = torch.rand(8, *ones) + 0.5 if axis == "output" else torch.rand(1, 6, *ones[1:]) + 0.5
    stem = "lora_unet_conv_in"
    path = tmp_path / "dora.safetensors"
    save_file(
        {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.dora_scale": scale,
            f"{stem}.alpha": torch.tensor(1.0),
        },
        path,
    )
    file = open_lora(path)
    assert file.kind == "dora"
    (module,) = file.load().modules.values()
    merged = base + (up.flatten(1) @ down.flatten(1)).reshape(base.shape) / 2
    dims = [d for d in range(base.ndim) if d != (0 if axis == "output" else 1)]
    norm = merged.pow(2).sum(dim=dims, keepdim=True).sqrt()
    assert torch.allclose(module.delta(base), merged * scale / norm - base, atol=1e-5)
    with pytest.raises(InputError, match="base"):
        module.delta()
    if axis == "output":
        convert_lora(path, "peft", tmp_path / "peft")
        convert_lora(tmp_path / "peft", "kohya", tmp_path / "back.safetensors")
        a, b = load_file(path), load_file(tmp_path / "back.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    else:
        with pytest.raises(InputError, match="inputs"):
            convert_lora(path, "peft", tmp_path / "peft")


def test_loha_to_peft_and_back(tmp_path):
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    saved = {f"{stem}.{role}": tensor for role, tensor in loha(8, 768, 2, 0).items()}
    saved[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(saved, tmp_path / "a.safetensors")
    convert_lora(tmp_path / "a.safetensors", "peft", tmp_path / "p")
    convert_lora(tmp_path / "p", "kohya", tmp_path / "b.safetensors")
    b = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(saved[key], b[key]) for key in saved)


def test_every_name_of_stable_diffusion_unflattens():
    """All linears and convolutions of the SD 1.x, SDXL and text encoder trees, by construction."""
    from .helpers import shapes_of, tiny_text, tiny_unet

    names = [*shapes_of("unet", tiny_unet()), *shapes_of("text_encoder", tiny_text())]
    names += [
        "unet.add_embedding.linear_1",
        "text_encoder_2.text_projection",
        "transformer.single_transformer_blocks.12.proj_out",
        "transformer.transformer_blocks.0.attn.add_q_proj",
        "transformer.transformer_blocks.3.ff_context.net.0.proj",
    ]
    assert len(names) > 60
    for name in names:
        flat = to_kohya(name, two_text_encoders="_2" in name)
        assert flat is not None and from_kohya(flat) == name, name


LDM = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.8.1.transformer_blocks.9.attn2.to_k": (
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
    ),
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "middle_block.1.transformer_blocks.0.ff.net.2": (
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    ),
    "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.11.1.proj_out": "up_blocks.3.attentions.2.proj_out",
    "output_blocks.3.0.out_layers.3": "up_blocks.1.resnets.0.conv2",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}


@pytest.mark.parametrize("ldm", LDM)
def test_ldm_names(ldm):
    assert from_ldm(ldm) == LDM[ldm]
    assert from_kohya("lora_unet_" + ldm.replace(".", "_")) == f"unet.{LDM[ldm]}"


def test_unflatten_and_families():
    assert unflatten("mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0") == (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    )
    assert [family_of_width(width) for width in (768, 1024, 2048, 64)] == [
        "sd1",
        "sd2",
        "sdxl",
        "unet-64",
    ]
