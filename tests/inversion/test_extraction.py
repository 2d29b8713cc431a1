"""Extrapolated sampling between the base and the LoRA's model, and cliques of similar pictures."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from diffward.errors import InputError
from diffward.inversion.extraction import cluster, copy_scores, extract, extrapolate
from diffward.lora import LoraModule, LoraWeights
from diffward.models.sampling import sample_latents


class Pixels:
    """An eye that sees the pixels as they are."""

    name = "pixels"

    def features(self, pixels):
        return pixels.reshape(len(pixels), -1).astype(float)


@pytest.fixture
def adapted(denoiser):
    """A denoiser with a strong random LoRA on its attention."""
    g = torch.Generator().manual_seed(0)
    modules = {
        name: LoraModule.of(
            name, torch.randn(2, shape[1], generator=g), 0.3 * torch.randn(shape[0], 2, generator=g)
        )
        for name, shape in denoiser.module_shapes().items()
        if name.startswith("unet.") and name.endswith(("to_q", "to_k", "to_v"))
    }
    denoiser.attach(LoraWeights(modules))
    return denoiser


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_weight_one_is_the_lora_and_weight_zero_the_base(adapted):
    conditioning, null = adapted.condition(["a red cup", "sks dog"]), adapted.condition([""])

    def plain(on):
        with adapted.adapter(on):
            return sample_latents(adapted, conditioning, null, generators(2), steps=3, guidance=1.0)

    tuned, base = plain(True), plain(False)
    assert not torch.allclose(tuned, base, atol=1e-2)
    for weight, same in ((1.0, tuned), (0.0, base)):
        found = extrapolate(adapted, conditioning, generators(2), weight=weight, steps=3)
        assert torch.allclose(found, same, atol=1e-4)
    # The null caption for the base makes no difference where the base has no weight.
    found = extrapolate(adapted, conditioning, generators(2), weight=1.0, steps=3, reference=null)
    assert torch.allclose(found, tuned, atol=1e-4)


def test_extrapolation_goes_on_from_the_base_through_the_lora(adapted):
    conditioning, null = adapted.condition(["a red cup"]), adapted.condition([""])
    t, noisy = torch.tensor([500]), torch.randn(1, *adapted.latent_shape)
    with adapted.adapter(False):
        base = adapted.predict(noisy, t, null)
    with adapted.adapter(True):
        tuned = adapted.predict(noisy, t, conditioning)
    seen = []
    original = adapted.sampler

    class Once(type(original)):
        def step(self, prediction, *arguments, **options):
            seen.append(prediction)
            return super().step(prediction, *arguments, **options)

        def set_timesteps(self, *arguments, **options):
            super().set_timesteps(*arguments, **options)
            self.timesteps = t

        def scale_model_input(self, sample, *_):
            return noisy

    adapted.sampler = Once.from_config(original.config)
    extrapolate(adapted, conditioning, generators(1), weight=3.0, steps=1, reference=null)
    assert torch.allclose(seen[0], base + 3 * (tuned - base), atol=1e-5)


def test_the_adapter_is_as_it_was_and_needs_to_be_there(adapted):
    conditioning = adapted.condition(["a red cup"])
    before = adapted._adapter.enabled
    extrapolate(adapted, conditioning, generators(1), steps=2)
    assert adapted._adapter.enabled == before
    adapted.detach()
    with pytest.raises(RuntimeError, match="no adapter"):
        extrapolate(adapted, conditioning, generators(1), steps=2)


def test_extract_depends_on_the_seed_alone(adapted):
    conditioning = adapted.condition(["a red cup", "sks dog"])
    first = extract(adapted, conditioning, Pixels(), count=6, steps=2, seed=1, pictures=2)
    torch.manual_seed(99)
    again = extract(adapted, conditioning, Pixels(), count=6, steps=2, seed=1, pictures=2)
    assert (first.pixels == again.pixels).all() and first.clusters == again.clusters
    fewer = extract(adapted, conditioning, Pixels(), count=3, steps=2, seed=1, pictures=2)
    assert np.abs(fewer.pixels.astype(int) - first.pixels[:3].astype(int)).max() <= 1
    other = extract(adapted, conditioning, Pixels(), count=6, steps=2, seed=2, pictures=2)
    assert (first.pixels != other.pixels).any()
    assert first.pixels.shape == (6, 16, 16, 3) and first.pixels.dtype == np.uint8
    assert sorted(i for c in first.clusters for i in c) == list(range(6))
    assert len(first.representatives) == 2
    assert all(r in c for r, c in zip(first.representatives, first.clusters, strict=False))
    with pytest.raises(InputError, match="at least 1"):
        extract(adapted, conditioning, Pixels(), count=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_clique_is_the_largest_there_is(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(9, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    similarity = points @ points.T
    found, threshold = cluster(similarity, 3)
    assert len(found) >= 3 and sorted(i for c in found for i in c) == list(range(9))

    def clique(nodes):
        return all(similarity[i, j] >= threshold for i, j in combinations(nodes, 2))

    left = set(range(9))
    for one in found:
        largest = max(
            size
            for size in range(1, 10)
            if any(clique(c) for c in combinations(sorted(left), size))
        )
        assert clique(one) and len(one) == largest
        left -= set(one)


def test_groups_of_like_pictures_are_the_clusters():
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8)
    points = np.concatenate(
        [c + 0.05 * rng.normal(size=(n, 8)) for c, n in zip(centres, (6, 4, 3))]
    )
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    order = rng.permutation(len(points))
    found, _ = cluster((points @ points.T)[np.ix_(order, order)], 3)
    belongs = np.repeat([0, 1, 2], (6, 4, 3))[order]
    assert [len(c) for c in found] == [6, 4, 3]
    assert all(len(set(belongs[c])) == 1 for c in found)
    assert cluster(np.ones((1, 1)), 4) == ([[0]], np.inf)
    assert cluster(np.ones((3, 3)), 4) == ([[0], [1], [2]], np.inf)


def test_copy_scores_single_out_what_was_drawn():
    rng = np.random.default_rng(0)
    drawn, others = rng.normal(size=(20, 16)), rng.normal(size=(5, 16))
    scores = copy_scores(drawn, np.concatenate([drawn[3:5] * 2, others]), np.zeros(16))
    assert scores[:2] == pytest.approx([1, 1]) and scores[2:].max() < 0.95
