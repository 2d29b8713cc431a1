"""Gradient matching: its own gradient is right and not zero, and true pictures match better than others."""

from __future__ import annotations

import pytest
import torch

from diffward.errors import InputError
from diffward.inversion.matching import Matching, match_gradients
from diffward.lora import LoraModule, LoraWeights
from diffward.models.pairs import Pairs

CAPTION = "a red cup"


@pytest.fixture
def victim(denoiser):
    """A LoRA after eight small steps of gradient descent on two pictures, and their latents."""
    g = torch.Generator().manual_seed(5)
    # Smooth, as pictures are.
    latents = torch.randn((2, *denoiser.latent_shape), generator=g).cumsum(2).cumsum(3) / 3
    with torch.random.fork_rng():
        torch.manual_seed(5)
        adapter = denoiser.inject(4, 4, ["to_q", "to_k", "to_v", "to_out.0"], text_encoder=False)
    conditioning = denoiser.condition([CAPTION]).expand(2, -1, -1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    for _ in range(8):
        t = torch.randint(1000, (16,), generator=g)
        eps = torch.randn((16, *denoiser.latent_shape), generator=g)
        optimizer.zero_grad()
        denoiser.errors(latents.repeat(8, 1, 1, 1), t, eps, conditioning.repeat(8, 1, 1)).mean().backward()  # fmt: skip
        optimizer.step()
    weights = adapter.weights()
    denoiser.detach()
    return weights, latents


def test_the_gradient_is_that_of_finite_differences(denoiser, victim):
    weights, latents = victim
    matching = Matching(denoiser, weights, Pairs.draw(denoiser, 4))
    g = torch.Generator().manual_seed(1)
    points = [torch.randn(latents.shape, generator=g), denoiser.condition([""])]
    asked = [p.clone().requires_grad_(True) for p in points]
    loss = 1 - matching.cosines(*asked, graph=True).mean()
    found = torch.autograd.grad(loss, asked)
    for place, gradient in enumerate(found):
        assert gradient.norm() > 1e-4
        step, values = gradient / gradient.norm(), []
        for sign in (1, -1):
            moved = list(points)
            moved[place] = points[place] + sign * 1e-2 * step
            values.append(float(1 - matching.cosines(*moved).mean()))
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.05)


def test_true_pictures_match_better_than_others(denoiser, victim):
    weights, latents = victim
    matching = Matching(denoiser, weights, Pairs.draw(denoiser, 32, seed=3))
    conditioning = denoiser.condition([CAPTION])
    true = float(matching.cosines(latents, conditioning).mean())
    g = torch.Generator().manual_seed(2)
    others = [
        float(matching.cosines(torch.randn(latents.shape, generator=g), conditioning).mean())
        for _ in range(5)
    ]
    assert true > 0.5 and true > max(others) + 0.02


def test_matching_rises_and_leaves_the_base_alone(denoiser, victim):
    weights, _ = victim
    before = {name: p.detach().clone() for name, p in denoiser.unet.named_parameters()}
    found = match_gradients(denoiser, weights, pictures=2, steps=12, lr=0.2)
    assert found.history[-1] > found.history[0] + 0.2
    assert len(found.history) == 13 and found.latents.shape == (2, *denoiser.latent_shape)
    assert found.cosines.keys() == weights.modules.keys()
    assert sum(found.cosines.values()) / len(found.cosines) == pytest.approx(float(found.history[-1]), abs=1e-5)  # fmt: skip
    for name, parameter in denoiser.unet.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None and not parameter.requires_grad
    one, again = (match_gradients(denoiser, weights, pictures=2, steps=2) for _ in range(2))
    assert torch.allclose(one.latents, again.latents, atol=1e-4)


def test_how_it_was_factored_does_not_matter(denoiser, victim):
    weights, latents = victim
    turn = torch.randn((4, 4), generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(4)
    other = LoraWeights({
        name: LoraModule.of(
            name, torch.linalg.solve(turn, m.tensors["down"]), m.tensors["up"] @ turn * 2, m.effective_alpha / 2
        )
        for name, m in weights.modules.items()
    })  # fmt: skip
    conditioning, pairs = denoiser.condition([CAPTION]), Pairs.draw(denoiser, 2)
    first, second = (Matching(denoiser, w, pairs).cosines(latents, conditioning) for w in (weights, other))  # fmt: skip
    assert torch.allclose(first, second, atol=1e-3)


def test_a_lora_that_changes_nothing_cannot_be_matched(denoiser, victim):
    weights, _ = victim
    for module in weights.modules.values():
        module.tensors["up"].zero_()
    with pytest.raises(InputError, match="nothing to match"):
        match_gradients(denoiser, weights, steps=1)
    with pytest.raises(InputError, match="at least 1"):
        match_gradients(denoiser, weights, steps=0)
