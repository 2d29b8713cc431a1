"""What looks at pictures: features against the models' own, galleries against a loop, captions one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffward.errors import InputError
from diffward.models.eyes import agreement_of, gallery_match, open_eye
from diffward.models.mini import attributes, world
from tests.conftest import make_pipeline


def planted(rng: Any, centre: np.ndarray, count: int) -> np.ndarray:
    return centre + 0.3 * rng.normal(size=(count, len(centre)))


def test_subjects_are_told_apart_by_their_galleries():
    rng = np.random.default_rng(0)
    # A large part that all share would hide who is who, were it not taken off.
    centres = 100 + rng.normal(size=(4, 16))
    galleries = {f"s{i}": planted(rng, c, 6) for i, c in enumerate(centres)}
    drawn = np.concatenate([planted(rng, c, 10) for c in centres])
    for i in range(4):
        found = gallery_match(drawn, f"s{i}", galleries)
        assert found.dtype == bool
        assert found.tolist() == [k // 10 == i for k in range(40)]


def test_a_match_is_the_loops():
    rng = np.random.default_rng(3)
    galleries = {name: rng.normal(size=(size, 5)) for name, size in (("a", 2), ("b", 3), ("c", 7))}
    drawn = rng.normal(size=(30, 5))
    centre = sum(g.mean(0) for g in galleries.values()) / 3
    wanted = []
    for x in drawn:
        means = {}
        for name, own in galleries.items():
            cosines = [
                np.dot(x - centre, y - centre)
                / np.linalg.norm(x - centre)
                / np.linalg.norm(y - centre)
                for y in own
            ]
            means[name] = np.mean(sorted(cosines, reverse=True)[:3])
        wanted.append(max(means, key=means.__getitem__))
    for name in galleries:
        assert gallery_match(drawn, name, galleries).tolist() == [w == name for w in wanted]


def test_nobody_matches_one_in_k_times():
    rng = np.random.default_rng(1)
    galleries = {str(i): rng.normal(size=(8, 24)) for i in range(5)}
    drawn = rng.normal(size=(2000, 24))
    assert sum(gallery_match(drawn, str(i), galleries).mean() for i in range(5)) == pytest.approx(1)
    assert gallery_match(drawn, "0", galleries).mean() == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize(
    ("galleries", "words"),
    [
        ({"b": 3, "c": 3}, "no gallery of a"),
        ({"a": 3}, "only one gallery"),
        ({"a": 3, "b": 0}, "gallery b"),
    ],
)
def test_galleries_that_cannot_tell(galleries, words):
    with pytest.raises(InputError, match=words):
        gallery_match(
            np.zeros((1, 4)), "a", {name: np.ones((n, 4)) for name, n in galleries.items()}
        )


def test_the_attribute_network_sees_its_world_only():
    eye = open_eye("attributes")
    assert eye.features(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, 192)
    with pytest.raises(InputError, match="32 x 32"):
        eye.features(np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("name", ["", "dino", "transformers:"])
def test_an_eye_that_is_none(name):
    with pytest.raises(InputError, match="--eye"):
        open_eye(name)


@pytest.fixture(scope="module")
def image_models(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("eyes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        picture = {**own, "image_size": 8, "patch_size": 4}
        ViTModel(ViTConfig(**picture)).save_pretrained(root / "vit")
        ViTModel(ViTConfig(**picture), add_pooling_layer=False).save_pretrained(root / "bare")
        text = {**own, "vocab_size": 30, "max_position_embeddings": 8}
        CLIPModel(
            CLIPConfig(text_config=text, vision_config=picture, projection_dim=12)
        ).save_pretrained(root / "clip")
    kind = {"vit": "ViTImageProcessor", "bare": "ViTImageProcessor", "clip": "CLIPImageProcessor"}
    for name, processor in kind.items():
        size = {"shortest_edge": 8} if name == "clip" else {"height": 8, "width": 8}
        (root / name / "preprocessor_config.json").write_text(json.dumps({
            "image_processor_type": processor, "do_resize": True, "size": size, "do_rescale": True,
            "rescale_factor": 1 / 255, "crop_size": {"height": 8, "width": 8}, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        }))  # fmt: skip
    return root


@pytest.mark.parametrize(("name", "width"), [("vit", 16), ("bare", 16), ("clip", 12)])
def test_any_image_model_is_an_eye(image_models, name, width):
    eye = open_eye(f"transformers:{image_models / name}")
    assert eye.name == f"transformers:{name}"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    seen = eye.features(pixels)
    assert seen.shape == (40, width) and np.isfinite(seen).all()
    # One by one the same: no batch leaks into another picture.
    assert np.allclose(seen[35:37], eye.features(pixels[35:37]), atol=1e-5)
    assert not np.allclose(seen[0], seen[1], atol=1e-5)


def test_the_pooled_output_is_the_models_own(image_models):
    from transformers import ViTModel

    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    model = ViTModel.from_pretrained(image_models / "vit").eval()
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        wanted = model(pixel_values=x).pooler_output.numpy()
    assert np.allclose(
        open_eye(f"transformers:{image_models / 'vit'}").features(pixels), wanted, atol=1e-5
    )


def test_captions_are_read_by_a_two_tower_model_with_its_tokenizer(image_models, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    vit, bare = (open_eye(f"transformers:{image_models / name}") for name in ("vit", "clip"))
    assert agreement_of(vit, ["a cup"]) is None and agreement_of(bare, ["a cup"]) is None
    folder = tmp_path / "clip"
    tokenizer = make_pipeline().tokenizer
    config = CLIPConfig.from_pretrained(image_models / "clip")
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(tokenizer), 12
    config.text_config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(4)  # one whose cosines are above 0
        model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(image_models / "clip" / "preprocessor_config.json", folder)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    captions = ["a red cup", "a boat", "a red cup"]
    found = agreement_of(open_eye(f"transformers:{folder}"), captions)(pixels, captions)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    for i, caption in enumerate(captions):  # one at a time, by the whole model
        tokens = tokenizer(caption, return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=x[i : i + 1], **tokens)
            cosine = float(out.logits_per_image / model.logit_scale.exp())
        assert found[i] == pytest.approx(max(cosine, 0.0), abs=1e-5)
    assert len(set(found)) == 3
    # Another model's tokenizer: the eye opens, and reads no captions.
    shutil.copytree(folder, tmp_path / "foreign")
    told = json.loads((tmp_path / "foreign" / "config.json").read_text())
    told["text_config"]["vocab_size"] = 4
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(told))
    weights = load_file(tmp_path / "foreign" / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    save_file(
        {**weights, name: weights[name][:4].clone()},
        tmp_path / "foreign" / "model.safetensors",
        {"format": "pt"},
    )
    assert agreement_of(open_eye(f"transformers:{tmp_path / 'foreign'}"), captions) is None


def test_captions_of_the_embedded_world_are_read_by_its_own_eye():
    drawings = [
        world.sample([3, 1, i], domain=kind) for i in range(8) for kind in ("logo", "garment")
    ]
    pixels, captions = np.stack([d.pixels for d in drawings]), [d.caption for d in drawings]
    eye = open_eye("attributes")
    found = agreement_of(eye, captions)(pixels, captions)
    assert found.mean() > 0.9
    # Every other picture, against the caption of another domain.
    assert agreement_of(eye, captions)(pixels, captions[1:] + captions[:1]).mean() < 0.6
    assert agreement_of(eye, [*captions, "a photo of a dog"]) is None
    assert agreement_of(eye, ["a portrait of sks"]) is None  # nothing beside the kind of picture


def test_what_a_caption_says_is_told_where_it_is_clear():
    logo, garment = (attributes.DOMAINS[kind] for kind in ("logo", "garment"))
    assert attributes.named_in("a logo of a red heart, white background") == {
        "domain": 1, "shape": logo["shape"].index("heart"), "logo_colour": logo["logo_colour"].index("red"),
    }  # fmt: skip
    # Blue may be the coat or the background.
    assert attributes.named_in("a picture of a blue striped coat") == {
        "domain": 2, "garment": garment["garment"].index("coat"), "pattern": garment["pattern"].index("striped"),
    }  # fmt: skip
    assert attributes.named_in("a portrait of sks") == {"domain": 0}
    # Two values of one thing: neither is what the picture must show.
    assert attributes.named_in("A picture of a hat and a coat.") == {"domain": 2}
    assert attributes.named_in("a dog") == {}


@pytest.mark.parametrize("kind", ["nothing", "size", "text"])
def test_a_model_that_cannot_be_an_eye_is_one_line(image_models, tmp_path, kind):
    folder = tmp_path / kind
    if kind == "size":
        shutil.copytree(image_models / "vit", folder)
        told = json.loads((folder / "preprocessor_config.json").read_text())
        told["size"] = {"height": 12, "width": 12}
        (folder / "preprocessor_config.json").write_text(json.dumps(told))
    elif kind == "text":
        from transformers import CLIPTextConfig, CLIPTextModel

        small = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        CLIPTextModel(CLIPTextConfig(vocab_size=9, **small)).save_pretrained(folder)
        shutil.copy(image_models / "vit" / "preprocessor_config.json", folder)
    with pytest.raises(InputError, match="cannot be used") as error:
        open_eye(f"transformers:{folder}")
    assert "\n" not in str(error.value)
