"""From a small zoo of the world's people on `mini` to an inverter: what it says, what it keeps, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffward.errors import InputError
from diffward.inversion import findings
from diffward.inversion.build import Source, build_zoo
from diffward.inversion.decoders import DECODERS
from diffward.inversion.encoder import contrast, kl
from diffward.inversion.floor import Floor
from diffward.inversion.identity import IdentitySpace, subject_features
from diffward.inversion.inverter import Inverter, open_inverter
from diffward.inversion.judge import retrieve
from diffward.inversion.learn import InverterSettings, prepare, train_inverter
from diffward.inversion.recipe import Ranges
from diffward.inversion.subjects import open_subjects
from diffward.lora import open_lora, write_lora
from diffward.models.eyes import open_eye
from diffward.models.load import load_base

QUICK = InverterSettings(
    epochs=2, batch=32, width=16, layers=1, side=12, prompt_steps=2, latent_steps=2
)
SEED = 77  # of people that the shipped inverter never saw
RANGES = Ranges(steps="3:6", pictures="1:2", batch=1, checkpoints=2, rank="2,4")


@pytest.fixture(scope="session")
def denoiser() -> Any:
    return load_base("mini", device="cpu")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_zoo(
        tmp_path_factory.mktemp("zoo"),
        Source("mini", "cpu"),
        "world",
        RANGES,
        count=72,
        per_shard=24,
        test_share=0.3,
    )


@pytest.fixture(scope="session")
def logos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_zoo(
        tmp_path_factory.mktemp("logos"), Source("mini", "cpu"), "world:logo", RANGES, count=16, per_shard=16, test_share=0.4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def material(zoo: Any, logos: Any) -> Any:
    return prepare(zoo, open_eye("attributes"), 12, [logos], strangers=200)


@pytest.fixture(scope="session")
def inverter(material: Any, denoiser: Any, tmp_path_factory: pytest.TempPathFactory) -> Inverter:
    return train_inverter(material, QUICK, tmp_path_factory.mktemp("inverter"), denoiser)


# --- parts against the truth -------------------------------------------------------------------


def test_floor_is_ridge_and_its_answers_are_out_of_fold() -> None:
    g = torch.Generator().manual_seed(0)
    cores = torch.randn(60, 2, 3, 3, generator=g)
    targets = cores.flatten(1)[:, :2] + 0.1 * torch.randn(60, 2, generator=g)
    groups = [i // 2 for i in range(60)]
    floor, unseen = Floor.fit(cores, targets, groups)
    # The textbook solution in the space of the features; the kernel is a mean over the modules.
    x = (cores.flatten(1) - cores.flatten(1).mean(0)).double()
    y = (targets - targets.mean(0)).double()
    weight = torch.linalg.solve(x.T @ x / 2 + floor.strength * torch.eye(18).double(), x.T @ y / 2)
    torch.testing.assert_close(floor.weight.double(), weight, atol=1e-5, rtol=1e-4)
    # Changing one subject's targets must not move what is said of that subject.
    changed = targets.clone()
    changed[:2] += 100
    _, again = Floor.fit(cores, changed - changed.mean(0) + targets.mean(0), groups)
    other = Floor.fit(cores, targets, groups)[1]
    assert (unseen == other).all()
    assert (again[2:] - unseen[2:]).abs().max() > 1  # everybody else's did move


def test_floor_needs_subjects() -> None:
    with pytest.raises(InputError, match="subjects to learn from"):
        Floor.fit(torch.randn(20, 1, 2, 2), torch.randn(20, 1), [i % 4 for i in range(20)])


def test_kl_is_that_of_two_normals() -> None:
    mu, logvar = torch.randn(50, 3), torch.randn(50, 3)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    p = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    wanted = torch.distributions.kl_divergence(q, p).sum(1).mean()
    assert float(kl(mu, logvar, 0.0)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(kl(torch.zeros(4, 3), torch.zeros(4, 3), 0.1)) == pytest.approx(0.3)


def test_rows_of_one_subject_do_not_compete() -> None:
    wanted = torch.eye(3)[[0, 0, 1, 2]]
    groups = torch.tensor([7, 7, 8, 9])
    loss = contrast(wanted, wanted, groups, temperature=1.0)
    by_hand = -math.log(math.e / (math.e + 2))
    assert float(loss[0]) == pytest.approx(by_hand, rel=1e-5)
    assert float(loss[2]) == pytest.approx(-math.log(math.e / (math.e + 3)), rel=1e-5)


def test_retrieval_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    found, own, gallery = (rng.normal(size=(n, 5)) for n in (20, 20, 50))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    ranks = [sum(cosine(f, g) >= cosine(f, o) for g in gallery) for f, o in zip(found, own)]
    result = retrieve(*(torch.tensor(x).double() for x in (found, own, gallery)))
    assert result.rank.tolist() == ranks
    assert result.figures()["top10"] == pytest.approx(np.mean(np.array(ranks) < 10))


def test_identity_vectors_hold_the_person_and_not_the_scene() -> None:
    subjects, eye = open_subjects("world", seed=3, side=64), open_eye("attributes")
    space = IdentitySpace.fit(subject_features(subjects, range(60), eye, [1]))
    first = torch.stack(
        [space.of(f) for f in subject_features(subjects, range(100, 140), eye, [1], 4)]
    )
    second = torch.stack(
        [space.of(f) for f in subject_features(subjects, range(100, 140), eye, [2], 4)]
    )
    nearest = torch.cdist(first, second).argmin(1)
    assert (nearest == torch.arange(40)).float().mean() > 0.9


# --- the inverter ------------------------------------------------------------------------------


def test_splits_share_no_subject(material: Any) -> None:
    sides = [
        {row.identity for row, there in zip(d.rows, d.subject) if there}
        for d in (material.train, material.valid, material.test)
    ]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert all(
        math.isnan(float(v[0])) == (not there)
        for v, there in zip(material.train.identity, material.train.subject)
    )


def test_the_shipped_inverter_reads_people_that_it_never_saw(tmp_path: Path, denoiser: Any) -> None:
    """After some thirty steps of two pictures; the same cores in another order tell nothing, nor does another's file."""
    inverter = open_inverter(None, denoiser)
    assert inverter is not None
    ranges = Ranges(
        steps="24:32",
        pictures="4:8",
        checkpoints=1,
        rank="4",
        optimizer="adamw",
        schedule="constant",
    )
    zoo = build_zoo(
        tmp_path, Source("mini", "cpu"), "world", ranges, seed=SEED, count=12, per_shard=12
    )
    eye, tokens = open_eye(inverter.facts.eye), inverter.basis.of_zoo(zoo, zoo.rows)
    subjects, numbers = open_subjects("world", seed=SEED, side=64), [r.identity for r in zoo.rows]
    features = subject_features(subjects, numbers, eye, [2], 6)
    own = inverter.standard_identity(torch.stack([inverter.space.of(f) for f in features]))
    reading, mixed = inverter.read(tokens), inverter.read(tokens.shuffled())
    size = inverter.facts.identity
    for name in ("identity", "floor"):
        found, control = (getattr(one, name)[:, :size] for one in (reading, mixed))
        ranks = {
            what: float(retrieve(vectors, own, inverter.gallery).rank.float().median())
            for what, vectors in (
                ("own", found),
                ("shuffled", control),
                ("other", found.roll(1, 0)),
            )
        }
        assert ranks["own"] < 20 and min(ranks["shuffled"], ranks["other"]) > 150, (name, ranks)


def test_a_saved_inverter_says_the_same(inverter: Inverter, material: Any, tmp_path: Path) -> None:
    inverter.save(tmp_path / "i.safetensors")
    again = Inverter.load(tmp_path / "i.safetensors")
    assert again.facts == inverter.facts
    before, after = (one.read(material.test.tokens) for one in (inverter, again))
    assert float(torch.cosine_similarity(before.identity, after.identity).min()) > 0.999
    assert before.picture_set.shape == (*before.identity.shape[:1], 8, before.identity.shape[1])
    assert float((before.picture_set - after.picture_set).abs().max()) < 0.05
    assert len(inverter.others_z) and torch.allclose(inverter.others_z, Inverter.load(tmp_path / "i.safetensors").others_z, atol=1e-2)  # fmt: skip
    assert float((before.log_steps - after.log_steps).abs().max()) < 0.05


def test_training_resumes_to_the_bit(
    material: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_inverter(material, QUICK, tmp_path / "a")
    import diffward.stage as stage

    steps = max(1, QUICK.epochs * len(material.train) // QUICK.batch)
    half, original = steps // 2, stage.torch.save

    def run(stop: bool) -> Inverter:
        import diffward.inversion.fit as fit

        def stopping(
            name: str, count: int, step: Any, state: Any, file: Path, **options: Any
        ) -> None:
            def limited(number: int) -> Any:
                if stop and number == half:
                    raise KeyboardInterrupt
                return step(number)

            stage.run_stage(name, count, limited, state, file, every=half, **options)

        monkeypatch.setattr(fit, "run_stage", stopping)
        return train_inverter(material, QUICK, tmp_path / "b")

    with pytest.raises(KeyboardInterrupt):
        run(True)
    assert original is stage.torch.save
    resumed = run(False)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    with pytest.raises(InputError, match="other settings or data"):
        train_inverter(material, replace(QUICK, lr=1e-5), tmp_path / "b")


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "peft"])
def test_a_file_reads_alike_in_every_layout(
    inverter: Inverter, zoo: Any, denoiser: Any, tmp_path: Path, kind: Any
) -> None:
    row = zoo.rows[0]
    write_lora(zoo.lora(row), tmp_path / "l.safetensors", kind)
    tokens = inverter.tokens(open_lora(tmp_path / "l.safetensors").load(), denoiser)
    wanted = inverter.tokens(zoo.lora(row))
    torch.testing.assert_close(tokens.cores, wanted.cores, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        inverter.read(tokens).identity, inverter.read(wanted).identity, atol=1e-4, rtol=0
    )


def test_decoders_draw_and_depend_on_z(
    inverter: Inverter, material: Any, denoiser: Any, zoo: Any
) -> None:
    z = inverter.read(material.test.tokens).mu[:2]
    denoiser.attach(zoo.lora(material.test.rows[0]))
    try:
        for entry in DECODERS:
            pixels = entry.obj(inverter, denoiser, z, [1, 1])
            assert pixels.shape == (2, 64, 64, 3) and pixels.dtype == np.uint8
            assert (pixels[0] != pixels[1]).any(), entry.name
            again = entry.obj(inverter, denoiser, z, [1, 1])
            assert (pixels == again).all(), entry.name
    finally:
        denoiser.detach()


def test_an_inverter_of_another_base_is_refused(
    inverter: Inverter, tmp_path: Path, tiny_denoiser: Any, zoo: Any
) -> None:
    inverter.save(tmp_path / "i.safetensors")
    with pytest.raises(InputError, match="reads LoRAs of mini"):
        open_inverter(tmp_path / "i.safetensors", tiny_denoiser())
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="is no inverter"):
        Inverter.load(tmp_path / "junk.safetensors")


# --- findings ----------------------------------------------------------------------------------


def test_p_values_are_ranks(inverter: Inverter, material: Any) -> None:
    """Against brute force, and never below what the null distribution can show."""
    data = material.test.last()
    features = subject_features(material.subjects, [data.rows[0].identity], material.eye, [5])[0]
    found = findings.identity_finding(inverter, data.tokens.of([0]), features)
    wanted = inverter.standard_identity(inverter.space.of(features))
    read = inverter.read(data.tokens.of([0])).floor[0, : inverter.facts.identity]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / a.norm() / b.norm())

    own = cosine(read, wanted)
    assert found.closeness == pytest.approx(own, abs=1e-5)
    assert found.rank == 1 + sum(cosine(read, g) >= own for g in inverter.gallery)
    assert found.p_gallery == found.rank / 201
    assert found.p_others == (1 + sum(cosine(o, wanted) >= own for o in inverter.others)) / (
        1 + len(inverter.others)
    )
    assert found.p_shuffled >= 1 / (1 + findings.SHUFFLES)
    assert found.p_value == max(found.p_gallery, found.p_others, found.p_shuffled)


def test_shuffled_tokens_keep_all_but_the_directions(material: Any) -> None:
    one = material.test.tokens.of([0])
    mixed = one.of([0] * 5).shuffled()
    assert (
        len(mixed) == 5
        and (mixed.norms == one.norms).all()
        and (mixed.spectra == one.spectra).all()
    )
    own = one.cores.flatten(2).sort(-1).values
    assert (mixed.cores.flatten(2).sort(-1).values == own).all()
    assert not (mixed.cores[0] == mixed.cores[1]).all()


def test_a_lora_that_changes_nothing_is_read_without_nan(inverter: Inverter, denoiser: Any) -> None:
    weights = denoiser.inject(
        4, 4.0, ["to_q", "to_k", "to_v", "to_out.0"], text_encoder=False
    ).weights()
    denoiser.detach()
    tokens = inverter.tokens(weights)
    assert not tokens.present.any()
    reading = inverter.read(tokens)
    assert torch.isfinite(reading.identity).all() and torch.isfinite(reading.subject).all()
