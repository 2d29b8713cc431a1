"""`alignment` against double-checked cosines of whole weight gradients, and on cosines of known AUC."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from diffward.inversion.matching import Matching
from diffward.membership.attack import ATTACKS
from diffward.membership.bank import OFF, ON, Layout, Pairs, bank_of_arrays
from diffward.membership.probes.gradients import gradient_pairs
from diffward.membership.statistics import auc
from diffward.models.features import encode_pictures
from tests.membership.test_attack_gradients import all_targets, bank_with

from .toy import binormal_auc


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_cosines_are_those_of_whole_gradients(tiny_denoiser, pictures, prediction):
    """Of every weight by autograd on the base, where the probe multiplies what goes in and what comes back."""
    denoiser = tiny_denoiser(prediction)
    features = encode_pictures(denoiser, pictures, cache=False)
    weights = all_targets(denoiser)
    pairs = Pairs.draw(denoiser, 3, seed=1)
    assert gradient_pairs(Layout.of_pairs(pairs)) == [0, 1, 2]
    ours = bank_with(denoiser, features, pictures, pairs, weights, batch=24).of("alignment", ON)
    assert ours.shape == (len(pictures), len(weights.modules))
    match = Matching(denoiser, weights, pairs)
    for n in range(3):
        text = features.conditioning(torch.tensor([n]))
        theirs = match.cosines(features.latents[n : n + 1], text).detach().numpy()
        np.testing.assert_allclose(np.sort(ours[n]), np.sort(theirs), atol=1e-5)
    for batch in (1, 64):
        again = bank_with(denoiser, features, pictures, pairs, weights, batch=batch)
        np.testing.assert_allclose(again.of("alignment", ON), ours, atol=1e-5)


def test_the_factorisation_does_not_matter(tiny_denoiser, pictures):
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures, cache=False)
    pairs = Pairs.draw(denoiser, 2)
    first = all_targets(denoiser)
    turned = deepcopy(first)
    mix = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    for module in turned.modules.values():
        up, down = module.tensors["up"], module.tensors["down"]
        module.tensors["up"] = torch.einsum("or...,rs->os...", up, mix)
        module.tensors["down"] = torch.einsum("rs,s...->r...", torch.linalg.inv(mix), down)
    a, b = (
        bank_with(denoiser, features, pictures, pairs, w).of("alignment", ON)
        for w in (first, turned)
    )
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_base_is_asked_along_what_nobody_learned(tiny_denoiser, pictures):
    """A control that saw the change itself would be as good as the attack."""
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures, cache=False)
    pairs = Pairs.draw(denoiser, 2)
    one, other = all_targets(denoiser, seed=0), all_targets(denoiser, seed=1)
    on = [bank_with(denoiser, features, pictures, pairs, w) for w in (one, other)]
    same = [bank.of("alignment", OFF) for bank in on]
    np.testing.assert_array_equal(*same)
    assert not np.allclose(on[0].of("alignment", ON), on[1].of("alignment", ON))


def test_a_lora_that_learned_nothing_scores_all_alike(tiny_denoiser, pictures):
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures, cache=False)
    weights = all_targets(denoiser)
    for module in weights.modules.values():
        module.tensors["up"].zero_()
    bank = bank_with(denoiser, features, pictures, Pairs.draw(denoiser, 2), weights)
    assert set(ATTACKS["alignment"].obj(bank)) == {0.0}


def test_score_on_a_toy_of_known_auc():
    rng = np.random.default_rng(0)
    member = np.arange(4000) % 2 == 0
    cosines = rng.normal(size=(4000, 5)) + 0.5 * member[:, None]
    bank = bank_of_arrays({("alignment", ON): cosines}, member)
    scores = ATTACKS["alignment"].obj(bank)
    assert auc(scores[member], scores[~member]) == pytest.approx(binormal_auc(0.5 * 5**0.5), abs=0.02)  # fmt: skip


def test_the_order_of_asking_does_not_matter_where_the_text_encoder_is_adapted(tiny_denoiser, pictures):  # fmt: skip
    """The pull is the base's, text encoder and all; other probes must not get its conditioning."""
    denoiser = tiny_denoiser()
    features = encode_pictures(denoiser, pictures, cache=False)
    adapter = denoiser.inject(3, 3.0, ["to_q", "to_v", "q_proj", "v_proj"], text_encoder=True)
    weights = adapter.weights()
    denoiser.detach()
    generator = torch.Generator().manual_seed(0)
    for module in weights.modules.values():
        module.tensors["up"].normal_(0, 0.3, generator=generator)
    assert any(not name.startswith("unet.") for name in weights.modules)
    pairs = Pairs.draw(denoiser, 2)
    answers = []
    for order in (("alignment", "errors"), ("errors", "alignment")):
        bank = bank_with(denoiser, features, pictures, pairs, weights)
        found = {probe: bank.of(probe, ON) for probe in order}
        answers.append(found)
    assert not np.allclose(answers[0]["errors"], bank.of("errors", OFF))
    for probe in ("alignment", "errors"):
        np.testing.assert_array_equal(answers[0][probe], answers[1][probe])
    alone = Matching(denoiser, weights, pairs)
    text = features.conditioning(torch.tensor([0]))
    theirs = alone.cosines(features.latents[:1], text).detach().numpy()
    np.testing.assert_allclose(np.sort(answers[0]["alignment"][0]), np.sort(theirs), atol=1e-5)
