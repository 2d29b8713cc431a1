"""The attribute network as the eye: its features tell kinds apart, its agreement knows the truth."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from diffward.errors import InputError
from diffward.metrics.fid import fid
from diffward.metrics.kid import kid
from diffward.metrics.metric import FeatureFunction
from diffward.models.mini import world
from diffward.models.mini.attributes import ATTRIBUTES, DOMAINS
from diffward.models.mini.reader import attribute_agreement, load_reader


@lru_cache(maxsize=1)
def drawings() -> list[world.Drawing]:
    return [world.sample([70_002, i]) for i in range(420)]


def pixels() -> np.ndarray:
    return np.stack([d.pixels for d in drawings()])


def test_the_heads_read_the_features() -> None:
    reader = load_reader()
    features = reader.features(pixels()[:150])
    assert features.shape == (150, 192) and features.dtype == np.float32
    seen = reader.read(pixels()[:150])
    for name, head in reader.heads.items():
        with torch.inference_mode():
            assert (head(torch.from_numpy(features)).argmax(1).numpy() == seen[name]).all()


def test_features_tell_kinds_of_pictures_apart() -> None:
    look: FeatureFunction = load_reader().features
    features = look(pixels())
    one, other = features[:210], features[210:]
    low, high = kid(one, other).interval
    assert low <= 0 <= high
    portrait = np.array([d.domain == "portrait" for d in drawings()])
    assert kid(features[portrait], features[~portrait]).interval[0] > 5 * high
    assert fid(one, other) < 0.3 * fid(one, look(255 - pixels()[210:]))


def test_agreement_with_what_was_drawn() -> None:
    domains = list(DOMAINS)
    truth = [{"domain": domains.index(d.domain), **d.attributes} for d in drawings()[:100]]
    reader, seen = load_reader(), pixels()[:100]
    right = attribute_agreement(reader, seen, truth)
    assert right.shape == (100,) and right.mean() > 0.97
    wrong = [{k: (v + 1) % len(ATTRIBUTES[k]) for k, v in row.items()} for row in truth]
    assert attribute_agreement(reader, seen, wrong).mean() < 0.03
    first = next(name for name in truth[0] if name != "domain")
    mixed = {"domain": truth[0]["domain"], first: wrong[0][first]}
    assert attribute_agreement(reader, seen[:1], [mixed]) == [0.5]


def test_agreement_on_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="picture 1: no attribute"):
        attribute_agreement(load_reader(), pixels()[:2], [{"domain": 0}, {}])
    with pytest.raises(InputError, match="2 pictures, but wishes for 1"):
        attribute_agreement(load_reader(), pixels()[:2], [{"domain": 0}])
