"""What the page draws from the weights of a trained LoRA, beside what must not look like its subject."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffward.data import load_pictures
from diffward.inversion.build import Source, build_zoo
from diffward.inversion.inverter import open_inverter
from diffward.inversion.recipe import Ranges
from diffward.inversion.subjects import open_subjects
from diffward.models.eyes import open_eye
from diffward.models.load import load_base
from diffward.report.drawn import draw_from_weights, drawn_words

RANGES = Ranges(steps="60:80", pictures="8:9", checkpoints=1, rank="8", optimizer="adamw")
SEED = 78  # of a person that the shipped inverter never saw


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from PIL import Image

    folder = tmp_path_factory.mktemp("drawn")
    zoo = build_zoo(
        folder / "zoo", Source("mini", "cpu"), "world", RANGES, seed=SEED, count=1, per_shard=1
    )
    subjects = open_subjects("world", seed=SEED, side=64)
    (folder / "own").mkdir()
    for i, picture in enumerate(subjects.pictures(zoo.rows[0].identity, 6, [2])):
        Image.fromarray(picture.pixels).save(folder / "own" / f"{i}.png")
    pictures = load_pictures(folder / "own")
    denoiser = load_base("mini", device="cpu")
    inverter = open_inverter(None, denoiser)
    assert inverter is not None
    weights = zoo.lora(zoo.rows[0])
    eye, pixels = open_eye(inverter.facts.eye), pictures.pixels(64)
    found = draw_from_weights(
        (inverter, denoiser, weights), inverter.tokens(weights, denoiser), eye,
        (pixels, eye.features(pixels), pictures), "a portrait of a person", 0,
    )  # fmt: skip
    assert not denoiser._adapter  # what is asked next must meet the bare base
    return found


@pytest.mark.slow
def test_where_the_models_may_not_draw_there_is_the_mean_picture(drawn: Any) -> None:
    """Without a pass of the denoiser."""
    denoiser = load_base("mini", device="cpu")
    inverter = open_inverter(None, denoiser)
    assert inverter is not None
    lora = denoiser.inject(4, 4.0, ["to_q", "to_k"], text_encoder=False).weights()
    denoiser.detach()
    eye, picture = open_eye(inverter.facts.eye), np.full((1, 64, 64, 3), 90, np.uint8)
    before = denoiser.evaluations
    owned: Any = [SimpleNamespace(name="mine.png", path=None)]
    found = draw_from_weights(
        (inverter, denoiser, lora), inverter.tokens(lora, denoiser), eye,
        (picture, eye.features(picture), owned), "a portrait of a person", 0, denoise=False,
    )  # fmt: skip
    assert [(g["title"], len(g["pairs"])) for g in found] == [(drawn[1]["title"], 1)]
    assert denoiser.evaluations == before


@pytest.mark.slow
def test_every_control_is_there_and_those_of_the_base_are_not_the_subject(drawn: Any) -> None:
    close = {
        group["title"]: float(np.mean([pair["closeness"] for pair in group["pairs"]]))
        for group in drawn
    }
    controls = {group["title"] for group in drawn if group["control"]}
    assert controls == {
        "Control: the same weights shuffled, by the untouched base model",
        "Control: the same weights shuffled, by the fine-tuned model",
        "Control: another LoRA's weights, by the untouched base model",
        "Control: another LoRA's weights, by the fine-tuned model",
        "Control: the untouched base model, “a portrait of a person”",
    }
    assert set(close) - controls == {
        "From the weights, by the untouched base model",
        "The mean picture, without any model that draws",
        "From the weights, by the fine-tuned model",
        "Without reading them: the fine-tuned model, empty prompt",
        "Without reading them: the fine-tuned model, “a portrait of a person”",
    }
    own = close["From the weights, by the untouched base model"]
    bare = [value for title, value in close.items() if title in controls and "untouched" in title]
    assert own > 0.3 and own > max(bare) + 0.2, close
    assert close["From the weights, by the fine-tuned model"] > 0.3


@pytest.mark.slow
def test_the_words_give_the_figure_of_each_way(drawn: Any) -> None:
    told = drawn_words(drawn)
    assert told.count(";") == len(drawn)  # one within the brackets
    for group in drawn:
        value = np.mean([pair["closeness"] for pair in group["pairs"]])
        assert f"{group['title'][1:]} {value:.2f}" in told


@pytest.mark.slow
def test_pairs_hold_small_pictures_of_the_owner(drawn: Any) -> None:
    for group in drawn:
        for pair in group["pairs"]:
            assert pair["drawn"].startswith("data:image/") and pair["file"].endswith(".png")
            assert -1 <= pair["closeness"] <= 1.0001
