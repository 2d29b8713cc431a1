"""PFAMI and the black-box attack: on a toy of known AUC, and their probes picture by picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffward.membership import attacks as _attacks  # noqa: F401  (registers them)
from diffward.membership.attack import ATTACKS, queries
from diffward.membership.bank import OFF, ON, Pairs, bank_of_arrays, build_bank
from diffward.membership.probes.crops import crop_shares
from diffward.membership.probes.generated import DRAWN, GUIDANCE, STEPS, similarities
from diffward.membership.statistics import auc
from diffward.models.features import Features, encode_pictures

from .test_attack_gradients import all_targets
from .toy import SHAPE, ToyDenoiser, ToyPictures, binormal_auc, shifted


class NumberedPictures(ToyPictures):
    """Pictures of one colour, which is their number: a crop shows it too."""

    def __getitem__(self, index):
        colour = (index % 256, index // 256, 0)

        class Plain:
            @staticmethod
            def load(side):
                return np.full((side, side, 3), colour, dtype=np.uint8)

        return Plain


class CroppingToy(ToyDenoiser):
    """A crop's latents are the picture's, plus the same pattern for all; the null text knows its row."""

    def encode(self, pixels):
        rows = torch.from_numpy(
            pixels[:, 0, 0, 0].astype(int) + 256 * pixels[:, 0, 0, 1].astype(int)
        )
        pattern = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
        return self.latents[rows] + 2 * pattern

    def predict(self, noisy, t, conditioning):
        without, with_text = conditioning.chunk(2) if len(conditioning) % 2 == 0 else (None, None)
        if without is not None and (without < 0).all():  # guidance: same picture, no text
            conditioning = torch.cat([with_text, with_text])
        return super().predict(noisy, t, conditioning)


def toy(on, off, member, pairs=16):
    n = len(member)
    latents = torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(0))
    denoiser = CroppingToy(latents, {"on": on, "off": off})
    from diffusers import DPMSolverMultistepScheduler

    denoiser.sampler = DPMSolverMultistepScheduler.from_config(denoiser.schedule.config)
    captions = [str(i) for i in range(n)]
    features = Features(latents, captions, captions, denoiser.condition(captions), torch.arange(n))
    return build_bank(
        denoiser, features, NumberedPictures(n), member, Pairs.draw(denoiser, pairs), batch=640
    )


def auc_of(name, bank):
    scores = ATTACKS[name].obj(bank)
    assert scores.shape == (len(bank),) and scores.dtype == np.float64
    return auc(scores[bank.is_member], scores[~bank.is_member])


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_pfami_on_the_toy(d):
    """l(x) is rms², and the crop adds the same to all: the fluctuation falls with rms alone."""
    on, off, member = shifted(500, d)
    bank = toy(on, off, member)
    # Standard error of the AUC: 0.025.
    assert auc_of("pfami", bank) == pytest.approx(binormal_auc(d), abs=0.06)
    base = bank.as_base()
    assert auc_of("pfami", base) == pytest.approx(0.5, abs=0.08)
    half = bank.of("crops", OFF)[:, 0::2]
    np.testing.assert_array_equal(base.of("crops", ON), half)
    own = bank.of("errors", OFF)[:, bank.layout.early[0::2]]
    np.testing.assert_allclose(ATTACKS["pfami"].obj(base), (half / own - 1).mean(axis=1))
    # Alone it would ask for the errors of the early pairs, not of all.
    assert queries(ATTACKS["pfami"], bank.layout) == 16


@pytest.mark.parametrize("d", [0.0, 1.5])
def test_blackbox_on_the_toy(d):
    """The better the denoiser knows a picture, the nearer is what it draws."""
    on, off, member = shifted(120, d, spread=0.3)
    bank = toy(0.2 * on, 0.2 * off, member)
    found = auc_of("blackbox", bank)
    if d == 0:
        assert found == pytest.approx(0.5, abs=0.16)
    else:
        assert 0.65 < found <= binormal_auc(d) + 0.1
    assert auc_of("blackbox", bank.as_base()) == pytest.approx(0.5, abs=0.16)
    answers = bank.of("generated", ON)
    assert answers.shape == (120, DRAWN, 3)
    assert bank.evaluations["generated", ON] == 120 * DRAWN * STEPS * 2


@pytest.mark.parametrize("d", [0.0, 0.7])
def test_blackbox_averages_the_draws(d):
    """R draws with independent unit noise: as one of d sqrt(R)."""
    rng = np.random.default_rng(1)
    member = rng.permutation(1000) < 500
    noise = rng.standard_normal((1000, DRAWN, 3))
    noise[:, :, 0] += d * member[:, None]
    bank = bank_of_arrays({("generated", ON): noise, ("generated", OFF): -noise}, member)
    assert auc_of("blackbox", bank) == pytest.approx(binormal_auc(d * DRAWN**0.5), abs=0.05)
    entry = ATTACKS["blackbox"]
    assert entry.extra["needs"] == ("captions",) and entry.extra["suite"] == "thorough"
    assert queries(entry, bank.layout) == 40


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_crops_are_the_loop_picture_by_picture(tiny_denoiser, pictures, prediction):
    denoiser = tiny_denoiser(prediction)
    features = encode_pictures(denoiser, pictures, cache=False)
    denoiser.attach(all_targets(denoiser))
    member = np.arange(len(pictures)) % 2 == 0
    pairs = Pairs.draw(denoiser, 8, seed=2)
    bank = build_bank(denoiser, features, pictures, member, pairs, batch=7)
    shares = crop_shares(bank.layout)
    np.testing.assert_allclose(shares, np.linspace(0.95, 0.7, 4))
    for model in (ON, OFF):
        table = np.zeros((len(pictures), 4))
        with torch.no_grad(), denoiser.adapter(model == ON):
            for n, picture in enumerate(pictures):
                text = denoiser.condition([picture.caption])
                for j, share in enumerate(shares):
                    image = Image.fromarray(picture.load(16))
                    edge = 16 * (1 - share) / 2
                    image = image.resize(
                        (16, 16), Image.Resampling.BICUBIC, box=(edge, edge, 16 - edge, 16 - edge)
                    )
                    latents = denoiser.encode(np.asarray(image)[None])
                    t, eps = pairs.t[j : j + 1], pairs.eps[j : j + 1]
                    noisy = denoiser.schedule.add_noise(latents, eps, t)
                    velocity = denoiser.prediction_type == "v_prediction"
                    truth = denoiser.schedule.get_velocity(latents, eps, t) if velocity else eps
                    said = denoiser.unet(noisy, t, text).sample
                    table[n, j] = float(torch.nn.functional.mse_loss(said, truth))
        np.testing.assert_allclose(bank.of("crops", model), table, rtol=1e-4)
    for batch in (1, 64):
        other = build_bank(denoiser, features, pictures, member, pairs, batch=batch)
        np.testing.assert_allclose(other.of("crops", ON), bank.of("crops", ON), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_generated_is_what_the_pipeline_draws(tiny_denoiser, tiny_pipeline, pictures, prediction):
    """Seeds by row, and one picture at a time through the pipeline of diffusers, without the adapter."""
    from diffusers import DPMSolverMultistepScheduler

    denoiser = tiny_denoiser(prediction)
    pictures = pictures.at([0, 3])
    features = encode_pictures(denoiser, pictures, cache=False)
    denoiser.attach(all_targets(denoiser))
    member = np.arange(len(pictures)) % 2 == 0
    pairs = Pairs.draw(denoiser, 4)
    bank = build_bank(denoiser, features, pictures, member, pairs, batch=7)
    ours = bank.of("generated", OFF)
    pipe = tiny_pipeline(prediction)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    n, r = 1, 1
    start = torch.randn(
        (1, *denoiser.latent_shape), generator=torch.Generator().manual_seed(n * DRAWN + r)
    )
    drawn = pipe(
        [pictures[n].caption], latents=start, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        height=16, width=16, output_type="latent",
    ).images  # fmt: skip
    z = features.latents[n : n + 1]
    np.testing.assert_allclose(ours[n, r], similarities(z, drawn)[0].numpy(), rtol=1e-3, atol=1e-4)
    assert ours[n, r, 1] == pytest.approx(-float(((z - drawn) ** 2).mean() ** 0.5), rel=1e-3)
    pooled = [torch.nn.functional.avg_pool2d(v, 2)[0] for v in (z, drawn)]
    flat = np.concatenate([[(c - c.mean()).ravel() for c in v.numpy()] for v in pooled]).reshape(
        2, -1
    )
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert ours[n, r, 0] == pytest.approx(cosine, abs=1e-4)
    assert np.abs(bank.of("generated", ON) - ours).max() > 1e-3
    other = build_bank(denoiser, features, pictures, member, pairs, batch=400)
    np.testing.assert_allclose(other.of("generated", OFF), ours, rtol=1e-3, atol=1e-4)


def test_similarity_of_a_picture_with_itself_is_the_highest():
    z = torch.randn(5, 4, 8, 8)
    np.testing.assert_allclose(similarities(z, z), np.tile([1.0, 0, 0], (5, 1)), atol=1e-5)
    assert (similarities(z, z.roll(1, 0)) < similarities(z, z)).all()
