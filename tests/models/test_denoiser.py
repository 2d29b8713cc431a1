"""The truth is the scheduler, the UNet called by hand, and diffusers' own LoRA loading."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from diffward.errors import InputError
from diffward.lora import LoraModule, LoraWeights, open_lora, write_lora

CASES = {
    "attention": ("attention", False),
    "attention+ff": ("attention+ff", False),
    "all": ("all", False),
    "all and text": ("all", True),
}


def inputs(denoiser, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(n, 4, 8, 8, generator=generator)
    eps = torch.randn(n, 4, 8, 8, generator=generator)
    t = torch.tensor([3, 400, 990])[:n]
    return latents, t, eps, denoiser.condition(["a red cup", "sks dog", ""][:n])


def look(denoiser):
    """What the model makes of fixed inputs: conditioning and prediction."""
    text = denoiser.condition(["a red cup", "sks dog", ""])
    latents, t, eps, _ = inputs(denoiser)
    with torch.no_grad():
        return text, denoiser.predict(denoiser.noise(latents, t, eps), t, text)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gap(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def state(denoiser):
    """Every parameter of the base by name, copied."""
    return {
        f"{prefix}.{name}": parameter.detach().clone()
        for prefix, component in denoiser.components().items()
        for name, parameter in component.named_parameters()
    }


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def shake(adapter, seed=0):
    """Random factors, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def random_lora(denoiser, text_encoder=True, alpha=1.5):
    # All four projections of the text encoder: diffusers tells kohya's layout by `out_proj`.
    ends = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv1",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
    )
    generator = torch.Generator().manual_seed(4)
    modules = {}
    for name, shape in denoiser.module_shapes().items():
        if name.endswith(ends) and (text_encoder or name.startswith("unet")):
            down = 0.3 * torch.randn((2, *shape[1:]), generator=generator)
            up = 0.3 * torch.randn((shape[0], 2, *[1] * (len(shape) - 2)), generator=generator)
            modules[name] = LoraModule.of(name, down, up, alpha)
    return LoraWeights(modules)


# --- the verbs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_the_schedulers(tiny_denoiser, prediction):
    denoiser = tiny_denoiser(prediction)
    latents, t, eps, _ = inputs(denoiser)
    scheduler = denoiser.sampler
    expected = scheduler.add_noise(latents, eps, t)
    torch.testing.assert_close(denoiser.noise(latents, t, eps), expected, atol=1e-6, rtol=0)
    target = eps if prediction == "epsilon" else denoiser.schedule.get_velocity(latents, eps, t)
    torch.testing.assert_close(denoiser.target(latents, t, eps), target, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_errors_are_those_of_single_pictures(tiny_denoiser, prediction):
    denoiser = tiny_denoiser(prediction)
    latents, t, eps, text = inputs(denoiser)
    with torch.no_grad():
        together = denoiser.errors(latents, t, eps, text)
        assert denoiser.evaluations == 3
        assert together.shape == latents.shape
        for i in range(3):
            noisy = denoiser.sampler.add_noise(latents[i : i + 1], eps[i : i + 1], t[i : i + 1])
            said = denoiser.unet(noisy, int(t[i]), text[i : i + 1]).sample
            if prediction == "epsilon":
                truth = eps[i : i + 1]
            else:
                truth = denoiser.schedule.get_velocity(
                    latents[i : i + 1], eps[i : i + 1], t[i : i + 1]
                )
            torch.testing.assert_close(
                together[i : i + 1], (said - truth) ** 2, atol=1e-5, rtol=1e-4
            )


def test_encode_is_the_scaled_mean_of_the_posterior(denoiser, monkeypatch):
    monkeypatch.setattr(type(denoiser), "vae_batch", 2)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    latents = denoiser.encode(pixels)
    assert latents.shape == (3, *denoiser.latent_shape) == (3, 4, 8, 8)
    x = torch.stack(
        [torch.tensor(p.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1) for p in pixels]
    )
    with torch.no_grad():
        mean = denoiser.vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(latents, mean * 0.3, atol=1e-5, rtol=1e-5)
    mirrored = denoiser.encode(pixels[:, :, ::-1])
    torch.testing.assert_close(mirrored, denoiser.encode(pixels[:, :, ::-1].copy()))


def test_decode_is_what_diffusers_shows(denoiser, monkeypatch):
    monkeypatch.setattr(type(denoiser), "vae_batch", 2)
    from diffusers.image_processor import VaeImageProcessor

    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = denoiser.decode(latents)
    assert pixels.shape == (3, 16, 16, 3) and pixels.dtype == np.uint8
    with torch.no_grad():
        shown = VaeImageProcessor().postprocess(denoiser.vae.decode(latents / 0.3).sample, "pil")
    for ours, theirs in zip(pixels, shown, strict=True):
        assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_conditioning_is_diffusers(denoiser, tiny_pipeline):
    captions = ["a red cup", "", "a very long caption that does not fit the encoder"]
    expected, _ = tiny_pipeline().encode_prompt(captions, "cpu", 1, False)
    got = denoiser.condition(captions, batch=2)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.1


def test_unknown_prediction_type_and_odd_resolution_are_refused(tiny_pipeline):
    from diffward.models.denoiser import Denoiser

    pipe = tiny_pipeline()
    with pytest.raises(InputError, match="--resolution 17: must be a multiple of 2"):
        Denoiser(pipe, "tiny", resolution=17)
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(InputError, match="'sample' is not supported"):
        Denoiser(pipe, "tiny")


# --- a LoRA from a file ------------------------------------------------------------------------


def test_attached_on_and_off(denoiser):
    before, names = look(denoiser), state(denoiser)
    weights = random_lora(denoiser)
    denoiser.attach(weights)
    assert denoiser.adapts_text
    on = look(denoiser)
    with denoiser.adapter(False):
        assert same(look(denoiser), before)
        with denoiser.adapter(True):
            assert same(look(denoiser), on)
        assert same(look(denoiser), before)
    assert same(look(denoiser), on)
    assert gap(on, before) > 0.01
    denoiser.detach()
    assert same(look(denoiser), before) and same_state(state(denoiser), names)
    with pytest.raises(RuntimeError), denoiser.adapter(True):
        pass
    # By hand: W + alpha / rank * up @ down.
    with torch.no_grad():
        for name, module in weights.modules.items():
            prefix, path = name.split(".", 1)
            target = denoiser.components()[prefix].get_submodule(path).weight
            up, down = module.tensors["up"].flatten(1), module.tensors["down"]
            change = 0.75 * (up @ down.flatten(1)).reshape(target.shape)
            target.add_(change)
    assert gap(look(denoiser), on) < 1e-5


def test_unet_only_leaves_the_text_encoder(denoiser):
    denoiser.attach(random_lora(denoiser, text_encoder=False))
    assert not denoiser.adapts_text


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_attaching_a_file_is_what_diffusers_loads(tiny_denoiser, tiny_pipeline, tmp_path, layout):
    from diffward.models.denoiser import Denoiser

    denoiser = tiny_denoiser()
    weights = random_lora(denoiser, text_encoder=layout != "peft")
    path = tmp_path / ("lora" if layout == "peft" else "lora.safetensors")
    write_lora(weights, path, layout)
    denoiser.attach(open_lora(path).load())

    pipe = tiny_pipeline()
    if layout == "peft":
        import peft

        pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, path).merge_and_unload()
    else:
        pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert gap(look(denoiser), look(Denoiser(pipe, "theirs"))) <= 1e-5


def test_a_lora_for_another_base_or_with_nan_is_refused(denoiser):
    before = state(denoiser)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    wide = LoraWeights(
        {name: LoraModule.of(name, torch.ones(2, 768), torch.ones(8, 2), 2.0)},
        source="x.safetensors",
    )
    with pytest.raises(InputError, match=r"looks like SD 1\.x"):
        denoiser.attach(wide)
    nan = LoraWeights(
        {name: LoraModule.of(name, torch.full((2, 16), torch.nan), torch.ones(8, 2), 2.0)},
        source="x.safetensors",
    )
    with pytest.raises(InputError, match=r"x\.safetensors.*not finite"):
        denoiser.attach(nan)
    assert same_state(state(denoiser), before)


# --- a new LoRA, through PEFT ------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_injected(tiny_denoiser, tmp_path, case):
    targets, text_encoder = CASES[case]
    denoiser = tiny_denoiser()
    from diffward.models.adapters import TARGETS

    before, names, identity = look(denoiser), state(denoiser), denoiser.identity
    adapter = denoiser.inject(3, 5.0, TARGETS[targets], text_encoder=text_encoder)
    assert denoiser.adapts_text == text_encoder and denoiser.trainable_adapter is adapter
    assert same(look(denoiser), before)  # B = 0
    shake(adapter)
    on = look(denoiser)
    assert gap(on, before) > 0.01
    with denoiser.adapter(False):
        assert same(look(denoiser), before)
    assert same(look(denoiser), on)
    assert all(p.requires_grad for p in adapter.parameters())
    trainable = [
        p for c in denoiser.components().values() for p in c.parameters() if p.requires_grad
    ]
    assert len(trainable) == len(adapter.parameters())

    weights = adapter.weights()
    suffixes = {name.rsplit("blocks.", 1)[-1] for name in weights.modules}
    assert any(".ff." in s for s in suffixes) == (targets != "attention")
    assert any("conv1" in s for s in suffixes) == (targets == "all")
    denoiser.detach()
    assert same(look(denoiser), before) and same_state(state(denoiser), names)
    assert denoiser.identity == identity and denoiser.trainable_adapter is None

    for layout in ("diffusers", "kohya", "peft"):
        path = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        write_lora(weights, path, layout)
        denoiser.attach(open_lora(path).load())
        assert gap(look(denoiser), on) <= 1e-5, layout
        denoiser.detach()

    # The factors can be put back into a new adapter.
    denoiser.inject(3, 5.0, TARGETS[targets], text_encoder=text_encoder).load(weights)
    assert same(look(denoiser), on)


def test_gradient_reaches_the_factors_only_while_on(denoiser):
    adapter = denoiser.inject(2, 2.0, ["to_q"], text_encoder=False)
    shake(adapter)
    latents, t, eps, text = inputs(denoiser)
    with denoiser.adapter(False):
        assert not denoiser.errors(latents, t, eps, text).requires_grad
    denoiser.errors(latents, t, eps, text).mean().backward()
    assert all(bool(p.grad.any()) for p in adapter.parameters())


def test_targets_that_match_nothing_leave_the_base_as_it_was(denoiser):
    before, names = look(denoiser), state(denoiser)
    with pytest.raises(InputError, match="matches the targets"):
        denoiser.inject(2, 2.0, ["no_such_module"], text_encoder=True)
    assert same(look(denoiser), before) and same_state(state(denoiser), names)
    denoiser.inject(2, 2.0, ["to_q"], text_encoder=True)


# --- identity ----------------------------------------------------------------------------------


def test_identity_does_not_see_the_adapter(tiny_denoiser):
    plain = tiny_denoiser()
    identities = plain.identity, plain.unet_identity
    for prepare in (
        lambda d: d.attach(random_lora(d)),
        lambda d: shake(d.inject(2, 2.0, ["to_q", "conv1"], text_encoder=True)),
    ):
        denoiser = tiny_denoiser()
        prepare(denoiser)
        assert (denoiser.identity, denoiser.unet_identity) == identities


def test_identity_tells_bases_apart(tiny_denoiser, tiny_pipeline):
    from diffward.models.denoiser import Denoiser

    plain = tiny_denoiser()
    other = tiny_denoiser(seed=1)
    assert plain.identity != other.identity and plain.unet_identity != other.unet_identity
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1e-3
    changed = Denoiser(pipe, "tiny")
    assert changed.identity == plain.identity and changed.unet_identity != plain.unet_identity
    # The same weights under another schedule give other errors.
    assert tiny_denoiser("v_prediction").unet_identity != plain.unet_identity


def test_identity_is_the_same_in_another_process(base_folder):
    from diffward.models.load import load_base

    here = load_base(base_folder, device="cpu").unet_identity
    script = (
        "import sys; from diffward.models.load import load_base;"
        "print(load_base(sys.argv[1], device='cpu').unet_identity)"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, str(base_folder)], capture_output=True, text=True, check=True
    )
    assert there.stdout.split()[-1] == here


def test_batches_shrink_as_pictures_grow(denoiser, monkeypatch):
    assert (denoiser.vae_batch, denoiser.unet_batch) == (64, 64)
    monkeypatch.setattr(denoiser, "resolution", 512)
    monkeypatch.setattr(denoiser, "latent_shape", (4, 64, 64))
    assert (denoiser.vae_batch, denoiser.unet_batch) == (2, 16)


@pytest.mark.parametrize("trained", ["an adapter", "what the base is shown"])
def test_gradients_in_half_precision_on_the_cpu(trained):
    """Of bf16 and of fp32, for the embedded base: they point the same way."""
    from diffward.models.load import load_base
    from diffward.models.mini import world

    drawings, gradients, losses = [world.sample([3, i]) for i in range(4)], [], []
    for precision in ("fp32", "bf16"):
        denoiser = load_base("mini", device="cpu", precision=precision)
        latents = denoiser.encode(np.stack([d.pixels for d in drawings]))
        text = denoiser.condition([d.caption for d in drawings])
        eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapter = denoiser.inject(
                4, 4.0, ["to_k", "to_v", "conv1"], text_encoder=False, init=False
            )
        for p in adapter.parameters()[1::2]:
            p.data.mul_(0.01)
        wanted = adapter.parameters() if trained == "an adapter" else [text.requires_grad_()]
        errors = denoiser.errors(latents, torch.tensor([20, 300, 600, 950]), eps, text)
        assert errors.dtype == torch.float32
        found = torch.autograd.grad(errors.mean(), wanted)
        assert all(g.dtype == torch.float32 for g in found)
        gradients.append(torch.cat([g.flatten() for g in found]))
        losses.append(float(errors.detach().mean()))
    full, half = gradients
    assert torch.cosine_similarity(full, half, dim=0) > 0.99
    assert float(half.norm() / full.norm()) == pytest.approx(1, abs=0.05)
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
