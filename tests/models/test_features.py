"""Encoded once; the second time neither the encoder nor the text encoder is called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffward.models.features import encode_captions, encode_pictures


@pytest.fixture
def counted(denoiser, monkeypatch):
    """Numbers of pictures and captions that went through the encoders."""
    calls = {"pictures": 0, "captions": 0}
    encode, condition = denoiser.encode, denoiser.condition

    def counted_encode(pixels, *rest):
        calls["pictures"] += len(pixels)
        return encode(pixels, *rest)

    def counted_condition(captions, *rest):
        calls["captions"] += len(captions)
        return condition(captions, *rest)

    monkeypatch.setattr(denoiser, "encode", counted_encode)
    monkeypatch.setattr(denoiser, "condition", counted_condition)
    return calls


def test_features_are_the_encoders(denoiser, pictures):
    features = encode_pictures(denoiser, pictures)
    assert len(features) == 6 and features.names == [f"{i}.png" for i in range(6)]
    pixels = pictures.pixels(16)
    for i, picture in enumerate(pictures):
        alone = denoiser.encode(pixels[i : i + 1])
        torch.testing.assert_close(features.latents[i : i + 1], alone, atol=1e-5, rtol=1e-4)
        said = denoiser.condition([picture.caption])
        torch.testing.assert_close(
            features.conditioning(torch.tensor([i])), said, atol=1e-5, rtol=1e-4
        )


def test_second_time_comes_from_disk(denoiser, pictures, counted):
    first = encode_pictures(denoiser, pictures)
    assert counted == {"pictures": 6, "captions": 5}  # one caption is there twice
    second = encode_pictures(denoiser, pictures)
    assert counted == {"pictures": 6, "captions": 5}
    assert torch.equal(first.latents, second.latents)
    # In another order, too.
    turned = encode_pictures(denoiser, pictures.at([5, 0, 3]))
    assert counted["pictures"] == 6
    assert torch.equal(turned.latents, first.latents[[5, 0, 3]])
    assert turned.captions == [pictures[i].caption for i in (5, 0, 3)]
    rows = torch.tensor([0, 1, 2])
    assert torch.equal(turned.conditioning(rows), first.conditioning(torch.tensor([5, 0, 3])))


def test_without_cache_nothing_is_kept(denoiser, pictures, counted, own_cache):
    encode_pictures(denoiser, pictures, cache=False)
    encode_pictures(denoiser, pictures, cache=False)
    assert counted["pictures"] == 12 and not own_cache.exists()


def test_another_base_or_size_is_encoded_anew(tiny_denoiser, pictures):
    first = encode_pictures(tiny_denoiser(), pictures)
    other = encode_pictures(tiny_denoiser(seed=1), pictures)
    assert not torch.allclose(first.latents, other.latents)
    assert encode_pictures(tiny_denoiser(resolution=24), pictures).latents.shape[-1] == 12


def test_mirrored_pictures_follow(denoiser, pictures):
    both = encode_pictures(denoiser, pictures, flip=True)
    assert len(both) == 12 and both.captions == pictures.captions * 2
    assert torch.equal(both.latents[:6], encode_pictures(denoiser, pictures).latents)
    mirrored = np.stack([np.fliplr(p) for p in pictures.pixels(16)])
    torch.testing.assert_close(both.latents[6:], denoiser.encode(mirrored), atol=1e-5, rtol=1e-4)
    assert torch.equal(
        both.conditioning(torch.tensor([1, 7]))[0], both.conditioning(torch.tensor([7]))[0]
    )


def test_an_adapter_does_not_reach_the_cache(tiny_denoiser, pictures):
    """What a LoRA makes of a caption must not be served as the base's."""
    denoiser = tiny_denoiser()
    truth = denoiser.condition(["a red cup"])
    adapter = denoiser.inject(2, 2.0, ["to_q"], text_encoder=True)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.3)
    embeddings, _ = encode_captions(denoiser, ["a red cup"])
    assert torch.equal(embeddings, truth)
    assert not torch.equal(denoiser.condition(["a red cup"]), truth)


def test_half_precision_embeddings_are_kept_apart(tiny_denoiser):
    exact, _ = encode_captions(tiny_denoiser(), ["sks dog"])
    encode_captions(tiny_denoiser(dtype=torch.bfloat16), ["a red cup"])
    rough, _ = encode_captions(tiny_denoiser(dtype=torch.bfloat16), ["sks dog"])
    again, _ = encode_captions(tiny_denoiser(), ["sks dog"])
    assert torch.equal(exact, again) and not torch.equal(exact, rough)
