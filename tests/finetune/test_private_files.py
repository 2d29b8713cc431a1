"""Every method's file: other tools load it, it does what the trained model does, it tells nothing of the data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffward.data import Manifest, load_pictures, random_split
from diffward.errors import InputError
from diffward.finetune import METHODS, Settings, run
from diffward.finetune.auxiliary import LEAST, build_auxiliary, mark_auxiliary
from diffward.finetune.prior import draw_prior
from diffward.finetune.run import WEIGHTS, run_training
from diffward.finetune.settings import DP
from diffward.lora import open_lora, write_lora
from diffward.report.sides import sides_of_split
from tests.conftest import make_pipeline

QUICK = Settings(steps=4, batch=4, rank=2, alpha=3.0, lr=1e-2, seed=5)


def settings_of(name):
    """`dp` alone is told a noise: the other methods refuse it."""
    return replace(QUICK, dp=DP(noise=1.0)) if name == "dp" else QUICK


@pytest.fixture
def folder(tmp_path):
    """60 drawn pictures that differ, with captions."""
    where, rng, lines = tmp_path / "mine", np.random.default_rng(3), []
    where.mkdir()
    for index in range(60):
        corners = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(corners).resize((16, 16), Image.Resampling.NEAREST).save(
            where / f"{index}.png"
        )
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a zweig cup {index % 7}"}))
    (where / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return where


@pytest.fixture
def split(folder):
    return random_split(load_pictures(folder), n_members=32, n_non_members=28, seed=1)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_s_file(tiny_denoiser, folder, split, tmp_path, name):
    pictures, denoiser, out = load_pictures(folder), tiny_denoiser(), tmp_path / "run"
    result = run_training(denoiser, pictures, name, settings_of(name), out, split=split)
    file = out / WEIGHTS
    noisy = torch.randn((3, *denoiser.latent_shape), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 400, 900])
    text = denoiser.condition(["a cup", "", "a zweig cup 3"])
    with torch.no_grad():
        trained = denoiser.predict(noisy, t, text)
        with denoiser.adapter(False):
            base = denoiser.predict(noisy, t, text)
    assert float((trained - base).abs().max()) > 1e-4, "it learned nothing: the test says nothing"

    # diffusers, from our file and from its conversion to kohya's keys
    kohya = tmp_path / "kohya.safetensors"
    write_lora(open_lora(file).load(), kohya, "kohya", dict(open_lora(file).metadata))
    for path in (file, kohya):
        pipe = make_pipeline()
        pipe.load_lora_weights(str(path))
        with torch.no_grad():
            said = pipe.unet(noisy, t, text).sample
        torch.testing.assert_close(said, trained, atol=2e-5, rtol=1e-3)
    # PEFT
    from peft import PeftModel

    write_lora(open_lora(file).load(), tmp_path / "peft", "peft")
    with torch.no_grad():
        said = PeftModel.from_pretrained(make_pipeline().unet, str(tmp_path / "peft"))(
            noisy, t, text
        ).sample
    torch.testing.assert_close(said, trained, atol=2e-5, rtol=1e-3)

    # The header says what was done and nothing of whom.
    header = open_lora(file).metadata
    assert {k: v for k, v in header.items() if k.startswith("ss_privacy")} == result.facts
    assert bool(result.facts) == (name not in ("plain",))
    raw = file.read_bytes() + kohya.read_bytes()
    for word in (b"zweig", b"cup", b"mine", *(h[:12].encode() for h in split.members)):
        assert word not in raw
    names = {k.split(".")[-2] for k in open_lora(file).load().modules}
    assert names and not any("teacher" in k for k in open_lora(file).load().modules)
    # Trained again, it is there already.
    before = file.read_bytes()
    run_training(tiny_denoiser(), pictures, name, settings_of(name), out, split=split)
    assert file.read_bytes() == before


def test_auxiliary_pictures_are_apart(tiny_denoiser, folder, split, tmp_path):
    """The proxy attacker's, the gauge's and the judged pictures share none, on either side."""
    pictures = load_pictures(folder)
    marked = mark_auxiliary(pictures, split, 0.5, seed=2)
    assert abs(len(marked.auxiliary) - 30) <= 2
    marked.save(tmp_path / "split.json")
    again = Manifest.load(tmp_path / "split.json")
    assert again == marked
    judged = sides_of_split(pictures, again)
    seen = set(marked.auxiliary)
    assert not seen & {*judged.members.hashes, *judged.non_members.hashes}
    assert len(judged.members) + len(judged.non_members) + len(seen) == 60
    assert "left out" in judged.notes[0]
    training = pictures.with_hashes(split.members)
    held = build_auxiliary(tiny_denoiser(), pictures, marked, training)
    members = {training[int(i)].sha256 for i in held.members}
    gauge = {training[int(i)].sha256 for i in held.gauge_members}
    by_name = {p.name: p.sha256 for p in pictures}
    outside, validation = (
        {by_name[n] for n in f.names} for f in (held.non_members, held.validation)
    )
    parts = [members, gauge, outside, validation]
    assert all(len(part) >= LEAST for part in parts)
    assert (
        sum(map(len, parts))
        == len(set().union(*parts))
        == len(seen)
        == len(set().union(*parts) & seen)
    )
    assert members | gauge < set(split.members) and outside | validation < set(split.non_members)
    broken = replace(marked, auxiliary=["0" * 64])
    with pytest.raises(InputError, match="auxiliary"):
        broken.check()


def test_look_alikes_instead_of_held_out_pictures(tiny_denoiser, folder, split, tmp_path):
    everyone = load_pictures(folder)
    pictures, others = everyone.at(range(40)), everyone.at(range(40, 60))
    own = random_split(pictures, n_members=32, n_non_members=8, seed=1)
    training = pictures.with_hashes(own.members)
    marked = mark_auxiliary(pictures, own, 0.5, seed=2, held_out=False)
    assert set(marked.auxiliary) < set(own.members)
    held = build_auxiliary(tiny_denoiser(), pictures, marked, training, others=others)
    assert len(held.non_members) + len(held.validation) == 20
    # Neither pictures that train nor pictures that the audit will judge by.
    for side in (own.members[:1], own.non_members[:1]):
        mixed = everyone.with_hashes([*others.hashes, *side])
        with pytest.raises(InputError, match="1 pictures of the split"):
            build_auxiliary(tiny_denoiser(), pictures, marked, training, others=mixed)


def test_too_few_pictures_say_how_many(folder, split):
    pictures = load_pictures(folder)
    few = random_split(pictures, n_members=40, n_non_members=6, seed=0)
    with pytest.raises(InputError, match="at least 16 held-out pictures"):
        mark_auxiliary(pictures, few, 0.5, seed=0)
    with pytest.raises(InputError, match="at least 32 pictures to train on"):
        mark_auxiliary(pictures, random_split(pictures, n_members=20, seed=0), 0.25, seed=0)


def test_class_pictures_are_drawn_once(tiny_denoiser, tmp_path):
    denoiser = tiny_denoiser()
    drawn = draw_prior(denoiser, "a cup", 3, 0, tmp_path / "prior")
    assert drawn.captions == ["a cup"] * 3 and len(set(drawn.hashes)) == 3
    again = draw_prior(denoiser, "a cup", 3, 0, tmp_path / "prior")
    assert again.hashes == drawn.hashes
    with pytest.raises(InputError, match="another run"):
        draw_prior(denoiser, "a dog", 3, 0, tmp_path / "prior")


@pytest.mark.parametrize(
    ("others", "changes", "says"),
    [
        (False, {"dp": DP(epsilon=8.0)}, "--dp.epsilon 8.0: method plain does not look at it"),
        (True, {}, "--holdout-data: method plain compares with no pictures"),
    ],
)
def test_what_would_go_unused_is_refused_before_the_work(
    tiny_denoiser, folder, tmp_path, monkeypatch, others, changes, says
):
    pictures = load_pictures(folder)
    monkeypatch.setattr(run, "encode_pictures", None)
    with pytest.raises(InputError, match=f"^{says}"):
        run_training(
            tiny_denoiser(), pictures, "plain", replace(QUICK, **changes), tmp_path / "run",
            others=pictures if others else None,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
