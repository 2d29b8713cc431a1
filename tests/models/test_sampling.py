"""The truth is the StableDiffusionPipeline, given the same latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffward.models.sampling import _generator, sample

PROMPTS = ["a red cup", "sks dog", "a green logo of a boat"]


def close(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_is_what_the_pipeline_draws(tiny_denoiser, tiny_pipeline, prediction):
    denoiser = tiny_denoiser(prediction)
    ours = sample(denoiser, PROMPTS, seed=3, steps=4, guidance=4.0, batch=2)
    assert ours.shape == (3, 16, 16, 3) and ours.dtype == np.uint8
    pipe = tiny_pipeline(prediction)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.stack(
        [torch.randn(denoiser.latent_shape, generator=_generator(3, i)) for i in range(3)]
    )
    theirs = pipe(
        PROMPTS,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=4.0,
        height=16,
        width=16,
        output_type="np",
    ).images
    assert np.abs(ours / 255 - theirs).max() < 0.01
    assert ours.std() > 1


@pytest.mark.parametrize(
    "scheduler",
    ["PNDMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"],
)
def test_a_picture_depends_on_seed_place_and_caption_alone(tiny_denoiser, scheduler):
    import diffusers

    denoiser = tiny_denoiser()
    denoiser.sampler = getattr(diffusers, scheduler).from_config(denoiser.sampler.config)
    together = sample(denoiser, PROMPTS, seed=1, steps=3)
    torch.manual_seed(77)  # whatever ran before does not matter
    assert close(sample(denoiser, PROMPTS, seed=1, steps=3), together)
    assert close(sample(denoiser, PROMPTS, seed=1, steps=3, batch=1), together)
    others = sample(denoiser, ["x", PROMPTS[1]], seed=1, steps=3)
    assert close(others[1], together[1]) and not close(others[0], together[0])
    assert not close(sample(denoiser, PROMPTS, seed=2, steps=3), together)
