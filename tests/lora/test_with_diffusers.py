"""The truth is what diffusers and PEFT do with the file, not what we think they do."""

from __future__ import annotations

import pytest
import torch

from diffward.lora import LoraModule, LoraWeights, open_lora, write_lora

from .helpers import factors, shapes_of, tiny_pipeline, tiny_text, tiny_unet

NAMES = {
    "unet": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "proj_in",
        "proj_out",
        "conv1",
        "conv2",
        "time_emb_proj",
        "conv_shortcut",
        "conv_in",
        "conv_out",
        "upsamplers.0.conv",
        "downsamplers.0.conv",
        "time_embedding.linear_1",
    ],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
KINDS = {
    "attention": {"unet": NAMES["unet"][:4]},
    "attention+text": {"unet": NAMES["unet"][:4], "text_encoder": NAMES["text_encoder"]},
    "conv": {"unet": ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut"]},
    "all+text": NAMES,
}


def random_weights(
    models: dict, targets: dict, mixed: bool, dora: bool = False, one_alpha: bool = False
) -> LoraWeights:
    """Random factors for all matching modules; alpha other than rank, mixed ranks and alphas."""
    modules = {}
    for component, ends in targets.items():
        for name, module in models[component].named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            if not any(name == end or name.endswith("." + end) for end in ends):
                continue
            shape = module.weight.shape
            index = len(modules)
            rank, alpha = (2, 1.5) if not mixed else (1 + index % 3, [1, 0.3, 6.0][index % 3])
            alpha = 1.5 if one_alpha else alpha
            kernel = shape[2] if len(shape) == 4 else None
            down, up = factors(shape[0], shape[1], rank, index, kernel)
            full = f"{component}.{name}"
            modules[full] = LoraModule.of(full, down * 0.3, up * 0.3, alpha)
            if dora:
                norm = module.weight.detach().flatten(1).norm(dim=1) * 1.3
                magnitude = norm.reshape(1, -1, 1, 1) if kernel else norm
                tensors = {**modules[full].tensors, "magnitude": magnitude}
                modules[full] = LoraModule(full, "dora", tensors, alpha, rank)
    return LoraWeights(modules)


def outputs(pipe):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.tensor([[0, 5, 9, 3, 1]])
    with torch.no_grad():
        text = pipe.text_encoder(tokens).last_hidden_state
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        return text, pipe.unet(noise, 10, text).sample


def apply(pipe, weights: LoraWeights) -> None:
    """Add our deltas to the base weights by hand."""
    for name, module in weights.modules.items():
        component, path = name.split(".", 1)
        target = getattr(pipe, component).get_submodule(path)
        target.weight.data += module.delta(target.weight.data)


# diffusers drops DoRA's scale from kohya files, so that pair cannot be compared.
@pytest.mark.parametrize(
    "layout, dora", [("diffusers", False), ("diffusers", True), ("kohya", False)]
)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_we_write(tmp_path, kind, mixed, layout, dora):
    pipe = tiny_pipeline()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    # diffusers 0.42 ignores differing alphas of attention layers in kohya files (it gives PEFT
    # patterns of names that do not exist); the file is right for the tools it is written for.
    weights = random_weights(models, KINDS[kind], mixed, dora, one_alpha=layout == "kohya")
    path = tmp_path / "lora.safetensors"
    write_lora(weights, path, layout)
    ours = tiny_pipeline()
    apply(ours, open_lora(path).load().resolve(all_shapes(ours)))
    plain = outputs(pipe)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    for expected, got, _base in zip(outputs(pipe), outputs(ours), plain):
        assert torch.allclose(expected, got, atol=2e-5, rtol=1e-4), (expected - got).abs().max()
    assert (outputs(pipe)[1] - plain[1]).abs().max() > 1e-3


def all_shapes(pipe) -> dict[str, tuple[int, ...]]:
    return shapes_of("unet", pipe.unet) | shapes_of("text_encoder", pipe.text_encoder)


def test_what_diffusers_saves_is_read_exactly(tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    unet, text = tiny_unet(), tiny_text()
    unet.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "conv1"]))
    text.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    for model in (unet, text):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict(),
    )
    file = open_lora(tmp_path)
    assert file.format == "diffusers"
    loaded = file.load()
    for component, model in (("unet", unet), ("text_encoder", text)):
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        assert layers
        for name, layer in layers.items():
            ours = loaded.modules[f"{component}.{name}"].delta()
            assert torch.allclose(ours, layer.get_delta_weight("default"), atol=1e-6)


def _peft(config_class, **settings):
    from peft import get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(tiny_unet(), config_class(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.requires_grad:
            parameter.data *= 1.2
    return model


PEFT_CASES = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 8}),
    "patterns": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 8, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn2.to_q": 1}},
    ),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 8, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 5}),
    "loha-conv": ("LoHaConfig", {"r": 2, "alpha": 5, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr-both": ("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr-full": ("LoKrConfig", {"r": 64, "alpha": 5}),
    "lokr-conv": ("LoKrConfig", {"r": 1, "alpha": 5, "use_effective_conv2d": True}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_deltas_equal_what_peft_merges(tmp_path, case):
    import peft

    name, settings = PEFT_CASES[case]
    targets = ["to_q", "to_k", "conv1", "proj_in", "ff.net.2"]
    model = _peft(getattr(peft, name), target_modules=targets, **settings)
    model.save_pretrained(tmp_path)
    base = {f"unet.{n}": m for n, m in tiny_unet().named_modules()}
    loaded = open_lora(tmp_path).load().resolve(shapes_of("unet", tiny_unet()))
    merged = dict(model.merge_and_unload().named_modules())
    assert len(loaded.modules) > 8
    for full, module in loaded.modules.items():
        weight = base[full].weight.data
        expected = merged[full.removeprefix("unet.")].weight.data - weight
        assert expected.abs().max() > 1e-3
        error = (module.delta(weight) - expected).abs().max()
        assert error < 1e-5 * max(1.0, expected.abs().max()), (full, error)


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_loads_the_folder_we_write(tmp_path, case):
    """Read PEFT's folder, write our own, load that with PEFT: the same merged model."""
    import peft

    name, settings = PEFT_CASES[case]
    targets = ["to_q", "to_k", "conv1", "proj_in", "ff.net.2"]
    model = _peft(getattr(peft, name), target_modules=targets, **settings)
    model.save_pretrained(tmp_path / "theirs")
    weights = open_lora(tmp_path / "theirs").load(dtype=None)
    write_lora(weights.resolve(shapes_of("unet", tiny_unet())), tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(tiny_unet(), tmp_path / "ours").merge_and_unload()
    for (key, a), (_, b) in zip(
        model.merge_and_unload().state_dict().items(), again.state_dict().items()
    ):
        assert torch.allclose(a, b, atol=1e-5), key


def test_peft_text_encoder_and_unet_folder(tmp_path):
    import peft

    pipe = tiny_pipeline()
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    weights = random_weights(models, KINDS["attention+text"], True)
    write_lora(weights, tmp_path / "both", "peft")
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"unet", "text_encoder"}
    file = open_lora(tmp_path / "both")
    assert file.format == "peft" and set(file.entries) == set(weights.modules)
    text = peft.PeftModel.from_pretrained(tiny_text(), tmp_path / "both" / "text_encoder")
    merged = dict(text.merge_and_unload().named_modules())
    base = dict(tiny_text().named_modules())
    for name, module in weights.modules.items():
        component, path = name.split(".", 1)
        if component == "text_encoder":
            expected = merged[path].weight - base[path].weight
            assert torch.allclose(module.delta(), expected, atol=1e-6)


def test_sdxl_second_text_encoder(tmp_path):
    """transformers' encoder with projection still has a `text_model` level; both layouts load."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection

    pipe = tiny_pipeline()
    config = tiny_text().config
    config.projection_dim = 16
    torch.manual_seed(9)
    second = CLIPTextModelWithProjection(config).eval()
    targets = {"text_encoder": ["q_proj", "fc1"], "text_encoder_2": ["q_proj", "fc1"]}
    models = {"text_encoder": pipe.text_encoder, "text_encoder_2": second}
    weights = random_weights(models, targets, True)
    for layout in ("diffusers", "kohya"):
        write_lora(weights, tmp_path / f"{layout}.safetensors", layout)
        state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            tmp_path / f"{layout}.safetensors", return_lora_metadata=True
        )
        torch.manual_seed(9)
        model = CLIPTextModelWithProjection(config).eval()
        StableDiffusionXLPipeline.load_lora_into_text_encoder(
            state, alphas, model, prefix="text_encoder_2", metadata=metadata
        )
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                ours = weights.modules[f"text_encoder_2.{name}"].delta()
                adapter = next(iter(layer.lora_A))
                assert torch.allclose(ours, layer.get_delta_weight(adapter), atol=1e-6), name
