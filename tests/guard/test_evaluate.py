"""`guard evaluate`: statistics against brute force, attackers against the weights they leave, cells against a loop."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffward.errors import InputError, TrainingError
from diffward.guard import attackers as attackers_module
from diffward.guard.attackers import ATTACKERS, AttackSettings
from diffward.guard.evaluate import (
    EvaluateSettings,
    Evaluation,
    Guarded,
    Side,
    evaluate,
    random_matched,
)
from diffward.metrics.kid import kid
from diffward.metrics.shares import (
    contrast_over_runs,
    mean_over_runs,
    ratio_over_runs,
    share_over_runs,
    wilson,
)
from diffward.models.adapters import ATTENTION
from diffward.models.eyes import gallery_match
from diffward.models.features import Features
from diffward.models.parameters import hashes
from diffward.models.sampling import sample

# --- statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # The first three rows of Newcombe 1998, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilsons_interval_is_the_published_one(hits, count, low, high):
    assert wilson(hits, count) == pytest.approx((low, high), abs=5e-5)


def test_no_share_of_nothing():
    with pytest.raises(InputError, match="no share"):
        wilson(0, 0)


def test_the_bootstrap_draws_runs_and_then_pictures():
    rng = np.random.default_rng(0)
    values = rng.random((3, 7)) + np.array([[0.0], [0.5], [3.0]])
    truth = []
    for _ in range(6000):
        runs = rng.integers(0, 3, 3)
        truth.append(np.mean([[values[r, rng.integers(0, 7)] for _ in range(7)] for r in runs]))
    # Of one run there is no t; of three, its interval is the wider here, and is known in closed form.
    value, ends = mean_over_runs(values, resamples=6000)
    assert value == pytest.approx(values.mean())
    means = values.mean(axis=1)
    half = 4.302653 * means.std(ddof=1) / np.sqrt(3)
    low, high = np.percentile(truth, [2.5, 97.5])
    assert ends == pytest.approx(
        (min(low, means.mean() - half), max(high, means.mean() + half)), rel=1e-5
    )
    one = values[:1]
    alone = [one[0, rng.integers(0, 7, 7)].mean() for _ in range(6000)]
    assert mean_over_runs(one, resamples=6000)[1] == pytest.approx(
        np.percentile(alone, [2.5, 97.5]), abs=0.01
    )


def test_the_bootstrap_of_runs_alone_is_brute_forces(monkeypatch):
    """Without the t, against all 27 draws of three runs of equal pictures."""
    from diffward.metrics import shares

    monkeypatch.setattr(shares, "student", lambda *_: None)
    values = np.repeat([[0.0], [1.0], [3.0]], 5, axis=1)
    every = sorted(np.mean([a, b, c]) for a in (0, 1, 3) for b in (0, 1, 3) for c in (0, 1, 3))
    # A tenth of 27 is 2.7: the third from either end.
    found = mean_over_runs(values, resamples=20000, level=0.8)
    assert found[1] == pytest.approx((every[2], every[-3]))
    assert found[1] == pytest.approx((1 / 3, 7 / 3))


def test_a_difference_covers_where_runs_differ():
    """95 % intervals of three runs, each with luck of its own, in 200 made-up evaluations."""
    rng, hit = np.random.default_rng(1), 0
    for number in range(200):
        luck = rng.normal(0, 0.08, (3, 1))
        u = rng.random((3, 40))
        found = contrast_over_runs((1, -1), [u < 0.3 + luck, u < 0.6], resamples=300, seed=number)
        hit += found[1][0] <= -0.3 <= found[1][1]
    assert 0.93 <= hit / 200 <= 1.0


def test_where_all_pictures_agree_the_difference_is_still_not_known_exactly():
    ones, zeros = np.ones((3, 10), bool), np.zeros((3, 10), bool)
    value, (low, high) = contrast_over_runs((1, -1), [zeros, ones])
    assert value == -1
    # Newcombe's square-and-add, correlation 0: the other ends of 0/30 and 30/30.
    reach = wilson(0, 30)[1]
    assert (low, high) == pytest.approx((-1, -1 + np.hypot(reach, reach)))


def test_a_contrast_stays_within_what_there_can_be():
    rng = np.random.default_rng(0)
    sets = [rng.random((2, 3)) < 0.5 for _ in range(3)]
    _, (low, high) = contrast_over_runs((2, -1, -1), sets)
    assert -2 <= low <= high <= 2
    assert contrast_over_runs((1, -1), [np.eye(2)[:1] > 0, np.eye(2)[1:] > 0])[1] == (-1, 1)


def test_newcombes_paired_interval_is_its_closed_form():
    """Method 10, correlation phi of the 2 x 2 table, in the case where nothing is wider: S = 1, few pictures."""
    from diffward.metrics.shares import _mover

    a, b, c, d = 12, 9, 2, 11  # both, first only, second only, neither
    n = a + b + c + d
    first = np.array([1] * (a + b) + [0] * (c + d), float)[None]
    second = np.array([1] * a + [0] * b + [1] * c + [0] * d, float)[None]
    p, q = (a + b) / n, (a + c) / n
    phi = (a * d - b * c) / np.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    (l1, u1), (l2, u2) = wilson(a + b, n), wilson(a + c, n)
    low = p - q - np.sqrt((p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2)
    high = p - q + np.sqrt((u1 - p) ** 2 - 2 * phi * (u1 - p) * (q - l2) + (q - l2) ** 2)
    assert _mover((1, -1), [first, second], 0.95) == pytest.approx((low, high))


def test_a_share_is_no_surer_than_wilson():
    hits = np.zeros((3, 8), bool)
    assert share_over_runs(hits) == (0.0, wilson(0, 24))


def test_the_part_of_a_gain_that_is_kept():
    rng = np.random.default_rng(2)
    base = rng.random(9) + 1
    reference = base - 0.5 + 0.1 * rng.random((3, 9))
    values = base - 0.3 + 0.1 * rng.random((3, 9))
    found = ratio_over_runs(base, reference, values, resamples=4000)
    assert found is not None
    value, ends = found
    assert value == pytest.approx((base.mean() - values.mean()) / (base.mean() - reference.mean()))
    truth = []
    for _ in range(4000):
        rows, runs = rng.integers(0, 9, 9), rng.integers(0, 3, 3)
        gain = [
            base[rows].mean() - np.mean([one[r][rows].mean() for r in runs])
            for one in (reference, values)
        ]
        truth.append(gain[1] / gain[0])
    low, high = np.percentile(truth, [2.5, 97.5])
    assert ends[0] <= low + 0.01 and ends[1] >= high - 0.01
    each = (base.mean() - values.mean(1)) / (base.mean() - reference.mean(1))
    half = 4.302653 * each.std(ddof=1) / np.sqrt(3)
    expected = min(low, each.mean() - half), max(high, each.mean() + half)
    assert ends == pytest.approx(expected, abs=0.01)


def test_where_the_reference_gains_nothing_there_is_no_part_of_it():
    base = np.ones(6)
    assert ratio_over_runs(base, np.full((2, 6), 1.1), np.full((2, 6), 0.9)) is None
    noise = np.random.default_rng(0).normal(0, 1, (3, 6))
    assert ratio_over_runs(base, 1 - 0.01 + noise - noise.mean(), np.full((3, 6), 0.9)) is None


# --- attackers ---------------------------------------------------------------------------------------

ATTACK = AttackSettings(steps=2, batch=2, lr=1e-2, lora_lr=1e-2, rank=2, prior_count=2)


def pixels_of(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (count, 2, 2, 3))
    return np.repeat(np.repeat(corners, 8, axis=1), 8, axis=2).astype(np.uint8)


def features_of(denoiser: Any, seed: int, count: int, caption: str) -> Features:
    captions = [caption] * count
    index = torch.zeros(count, dtype=torch.long)
    names = [f"{seed}-{i}.png" for i in range(count)]
    return Features(
        denoiser.encode(pixels_of(seed, count)),
        captions,
        names,
        denoiser.condition([caption]),
        index,
    )


def state(denoiser: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in denoiser.unet.named_parameters()}


def frozen_of(denoiser: Any) -> list[str]:
    """A mask over attention, norms and convolutions alike."""
    return [n for n, _ in denoiser.unet.named_parameters() if "down_blocks.0" in n]


def attack(denoiser: Any, name: str, frozen: list[str], seed: int = 0, prior: Any = None) -> Any:
    return ATTACKERS[name].obj(
        denoiser, features_of(denoiser, 0, 4, "a red cup"), frozen, ATTACK, seed, prior
    )


def moved(denoiser: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, p in denoiser.unet.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("name", ["full", "dreambooth", "unfreeze"])
def test_who_trains_all_weights(denoiser, name):
    before, frozen = state(denoiser), frozen_of(denoiser)
    prior = features_of(denoiser, 9, 2, "cup") if name == "dreambooth" else None
    effort = attack(denoiser, name, frozen, prior=prior)
    touched = moved(denoiser, before)
    assert touched and bool(touched & set(frozen)) == (name == "unfreeze")
    trains = [p for n, p in before.items() if name == "unfreeze" or n not in frozen]
    count = sum(p.numel() for p in trains)
    assert (effort.steps, effort.trained) == (2, count)
    assert effort.bytes == 4 * sum(p.numel() for p in before.values()) + 3 * 4 * count
    assert effort.step_seconds is not None and effort.step_seconds > 0 and effort.peak_bytes is None


@pytest.mark.parametrize("name", ["lora", "lora-kept"])
def test_who_trains_a_lora(denoiser, name):
    before, frozen = state(denoiser), frozen_of(denoiser)
    effort = attack(denoiser, name, frozen)
    assert denoiser.trainable_adapter is not None
    adapted = {n.removeprefix("unet.") for n in denoiser.trainable_adapter.weights().modules}
    attention = {
        n.removesuffix(".weight")
        for n in before
        if n.endswith(tuple(f".{m}.weight" for m in ATTENTION))
    }
    kept = {n for n in attention if f"{n}.weight" not in frozen}
    assert kept < attention
    assert adapted == (attention if name == "lora" else kept)
    wide = {n: before[f"{n}.weight"].shape for n in adapted}
    assert effort.trained == sum(ATTACK.rank * (a + b) for a, b in wide.values())
    denoiser.detach()
    assert not moved(denoiser, before)


def test_a_mask_on_all_attention_leaves_a_lora_nothing(denoiser):
    before = state(denoiser)
    frozen = [n for n in before if ".attn" in n]
    effort = attack(denoiser, "lora-kept", frozen)
    assert effort.trained == effort.steps == 0 and not moved(denoiser, before)
    assert denoiser.trainable_adapter is None


def test_ignoring_the_mask_is_full_fine_tuning_of_the_bare_base(tiny_denoiser):
    one, other = tiny_denoiser(), tiny_denoiser()
    attack(one, "unfreeze", frozen_of(one))
    attack(other, "full", [])
    assert not moved(one, state(other))


def test_class_pictures_are_needed_and_count(tiny_denoiser):
    one, other = tiny_denoiser(), tiny_denoiser()
    with pytest.raises(InputError, match="class"):
        attack(one, "dreambooth", [])
    attack(one, "dreambooth", [], prior=features_of(one, 9, 2, "cup"))
    attack(other, "full", [])
    assert moved(one, state(other))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0}, {"schedule": "linear"}, {"prior_weight": -1}, {"rank": 0}]
)
def test_attacks_that_make_no_sense(wrong):
    with pytest.raises(InputError, match="--attack"):
        AttackSettings(**wrong)


# --- the whole ---------------------------------------------------------------------------------------


class Coarse:
    """An eye of four numbers a picture."""

    name = "coarse"

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return (
            pixels.reshape(len(pixels), 2, 8, 2, 8, 3).mean(axis=(2, 4, 5)).reshape(len(pixels), 4)
            / 64
        )


def brighter(pixels: np.ndarray, subject: str) -> np.ndarray:
    """Something of the picture that differs between models; who is asked for matters."""
    level = pixels.astype(float).mean(axis=(1, 2, 3))
    return (np.round(level * 8) % 2 == 0) ^ (subject == "b")


def agreement(pixels: np.ndarray, prompts: list[str]) -> np.ndarray:
    return np.array([(p.astype(float).mean() % 10) / 10 for p in pixels])


SETTINGS = {
    "attackers": ["full", "lora-kept", "unfreeze"], "innocent_attackers": ["full"], "seeds": [3, 5], "pictures": 3,
    "innocent_pictures": 4, "draw_steps": 2, "pairs": 2, "resamples": 100, "attack": ATTACK,
}  # fmt: skip


@pytest.fixture
def sides(denoiser) -> dict[str, Side]:
    return sides_of(denoiser)


def sides_of(denoiser: Any) -> dict[str, Side]:
    return {
        "illegal": Side(
            features_of(denoiser, 0, 4, "a red cup"), features_of(denoiser, 1, 3, "a red cup"),
            {"a": ["a red cup", "sks dog"], "b": "a blue cup"}, pixels_of(1, 5), match=brighter, agreement=agreement,
            class_prompt="cup",
        ),
        "innocent": Side(
            features_of(denoiser, 2, 4, "a boat"), features_of(denoiser, 3, 3, "a boat"), ["a boat", "a green logo"],
            pixels_of(3, 5), class_prompt="boat",
        ),
    }  # fmt: skip


def edit_of(denoiser: Any) -> dict[str, torch.Tensor]:
    name = next(n for n, _ in denoiser.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    return {name: state(denoiser)[name] * 2}


def guards_of(denoiser: Any) -> list[Guarded]:
    frozen = frozen_of(denoiser)
    return [
        *(random_matched(denoiser, frozen, seed) for seed in SETTINGS["seeds"]), Guarded("freeze", frozen),
        Guarded("uce", edit=edit_of(denoiser)), Guarded("freeze+uce", frozen, edit_of(denoiser)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found(tiny_denoiser, tmp_path_factory) -> tuple[Any, dict[str, Side], Evaluation]:
    denoiser = tiny_denoiser()
    sides, before = sides_of(denoiser), state(denoiser)
    work = tmp_path_factory.mktemp("evaluation")
    evaluation = evaluate(
        denoiser,
        guards_of(denoiser),
        **sides,
        settings=EvaluateSettings(**SETTINGS),
        work=work,
        eye=Coarse(),
    )
    assert not moved(denoiser, before)
    assert not any(p.requires_grad for p in denoiser.unet.parameters())
    return denoiser, sides, evaluation


def row_of(
    evaluation: Evaluation, guard: str, attacker: str, domain: str = "illegal", seed: int = 3
) -> dict[str, Any]:
    (row,) = [
        r for r in evaluation.data["rows"]
        if (r["guard"], r["attacker"], r["domain"], r["seed"]) == (guard, attacker, domain, seed)
    ]  # fmt: skip
    return row


def test_every_guard_meets_every_attacker(found):
    _, _, evaluation = found
    data = evaluation.data
    names = ["none", "random", "freeze", "uce", "freeze+uce"]
    wanted = {("none", "nobody", d, s) for d in ("illegal", "innocent") for s in (3, 5)}
    for s in (3, 5):
        wanted |= {(g, a, "illegal", s) for g in names for a in ("full", "lora-kept", "unfreeze")}
        wanted |= {(g, "full", "innocent", s) for g in names}
    rows = [(r["guard"], r["attacker"], r["domain"], r["seed"]) for r in data["rows"]]
    assert len(rows) == len(set(rows)) and set(rows) == wanted
    assert len(data["summary"]) == len({r[:3] for r in wanted})
    assert data["schema"] == "diffward.guard/1" and data["eye"] == "coarse"
    json.dumps(data, allow_nan=False)


def test_what_is_the_same_by_construction_says_so(found):
    _, _, evaluation = found
    told = {
        (r["guard"], r["attacker"]): r["same_as"]
        for r in evaluation.data["rows"]
        if r["domain"] == "illegal"
    }
    assert (
        told["freeze", "unfreeze"]
        == told["random", "unfreeze"]
        == told["none", "unfreeze"]
        == "none/full"
    )
    # Edited weights stay edited, whatever an attacker unfreezes.
    assert told["uce", "unfreeze"] == "uce/full" and told["freeze+uce", "unfreeze"] == "uce/full"
    assert told["freeze", "full"] is told["freeze+uce", "full"] is told["uce", "full"] is None
    summary = {
        (r["guard"], r["attacker"], r["domain"]): r["same_as"] for r in evaluation.data["summary"]
    }
    assert summary["freeze", "unfreeze", "illegal"] == "none/full"


def test_an_attack_made_by_hand_gives_the_same(found, tiny_denoiser):
    """Fine-tuned, drawn and measured outside, with nothing of evaluate's."""
    _, sides, evaluation = found
    for guard, attacker, edited in (
        ("freeze", "unfreeze", False),
        ("freeze", "full", False),
        ("uce", "full", True),
    ):
        own = tiny_denoiser()
        if edited:
            own.unet.load_state_dict(edit_of(own), strict=False)
        side = sides["illegal"]
        ATTACKERS[attacker].obj(
            own, side.training, frozen_of(own) if guard == "freeze" else [], ATTACK, 3
        )
        drawn = sample(
            own, ["a red cup", "sks dog", "a red cup", *["a blue cup"] * 3], seed=3, steps=2
        )
        row = row_of(evaluation, guard, attacker)
        assert np.array_equal(evaluation.pictures(row), drawn)
        losses = []
        for i in range(len(side.held_out)):
            g = torch.Generator().manual_seed(0)
            eps = torch.randn((2, *own.latent_shape), generator=g)
            t = torch.tensor([250, 750])
            latents, words = (
                side.held_out.latents[[i, i]],
                side.held_out.conditioning(torch.tensor([i, i])),
            )
            with torch.no_grad():
                losses.append(float(own.errors(latents, t, eps, words).mean()))
        assert row["held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_rows_are_what_the_pictures_say(found):
    _, sides, evaluation = found
    eye = Coarse()
    for row in evaluation.data["rows"]:
        drawn = evaluation.pictures(row)
        assert row["pictures"] == len(drawn) == (6 if row["domain"] == "illegal" else 4)
        truth = kid(eye.features(drawn), eye.features(sides[row["domain"]].real))
        assert row["kid"] == {"value": truth.value, "ci95": list(truth.interval)}
        # More pictures than features on neither side: no FID.
        assert (row["fid"] is None) == (min(len(drawn), 5) <= 4)
        if row["domain"] == "innocent":
            assert row["identity_match"] is None and row["caption_agreement"] is None
            continue
        hits = [bool(brighter(one[None], "a" if i < 3 else "b")[0]) for i, one in enumerate(drawn)]
        assert row["identity_match"]["value"] == pytest.approx(sum(hits) / 6)
        assert row["identity_match"]["ci95"] == pytest.approx(wilson(sum(hits), 6))
        assert row["identity_match"]["by_subject"] == pytest.approx(
            {"a": sum(hits[:3]) / 3, "b": sum(hits[3:]) / 3}
        )
        assert row["caption_agreement"] == pytest.approx(agreement(drawn, []).mean())


def test_the_summary_is_the_rows(found):
    _, _, evaluation = found
    data = evaluation.data

    def mean(guard: str, attacker: str, domain: str, field: str) -> Any:
        rows = [
            r
            for r in data["rows"]
            if (r["guard"], r["attacker"], r["domain"]) == (guard, attacker, domain)
        ]
        values = [r[field]["value"] if isinstance(r[field], dict) else r[field] for r in rows]
        return None if None in values else pytest.approx(np.mean(values))

    for one in data["summary"]:
        name = one["guard"], one["attacker"], one["domain"]
        assert one["seeds"] == [3, 5]
        assert one["held_out_loss"] == mean(*name, "held_out_loss")
        assert one["kid"]["value"] == mean(*name, "kid")
        if one["domain"] == "innocent":
            continue
        own = mean(*name, "identity_match").expected
        assert one["identity_match"]["value"] == pytest.approx(own)
        if one["attacker"] == "nobody":
            continue
        plain, lots = (
            mean(g, name[1], name[2], "identity_match").expected for g in ("none", "random")
        )
        if one["guard"] != "none":
            assert one["vs_none"]["value"] == pytest.approx(own - plain)
            difference = (
                mean(*name, "kid").expected - mean("none", name[1], name[2], "kid").expected
            )
            assert one["kid_vs_none"]["value"] == pytest.approx(difference)
        if one["guard"] not in ("none", "random"):
            assert one["vs_random"]["value"] == pytest.approx(own - lots)
            assert one["beyond_twice_random"]["value"] == pytest.approx(2 * lots - own - plain)
            wanted = pytest.approx((plain - own) / (plain - lots)) if plain > lots else None
            assert one["drop_ratio"] == wanted
        for figure in (one["identity_match"], one["vs_none"], one["vs_random"], one["kid"]):
            assert figure is None or figure["ci95"][0] <= figure["value"] <= figure["ci95"][1]


def test_the_gain_is_measured_from_the_bare_base(found):
    _, _, evaluation = found
    for domain in ("illegal", "innocent"):
        base = row_of(evaluation, "none", "nobody", domain)["held_out_loss"]
        plain = row_of(evaluation, "none", "full", domain)
        for guard in ("none", "freeze", "uce"):
            row = row_of(evaluation, guard, "full", domain)
            gain = base - plain["held_out_loss"]
            wanted = (base - row["held_out_loss"]) / gain if gain > 0 else None
            assert row["gain_kept"] == (None if wanted is None else pytest.approx(wanted))
            assert row["memory_ratio"] == pytest.approx(row["attack_bytes"] / plain["attack_bytes"])
    assert row_of(evaluation, "none", "full")["gain_kept"] in (None, pytest.approx(1))
    assert row_of(evaluation, "freeze", "full")["memory_ratio"] < 1


def test_lots_hold_as_many_parameters_as_the_mask(denoiser):
    sizes = {n: p.numel() for n, p in denoiser.unet.named_parameters()}
    frozen = frozen_of(denoiser)
    goal = sum(sizes[n] for n in frozen)
    drawn = [set(random_matched(denoiser, frozen, seed).frozen) for seed in range(3)]
    for lot in drawn:
        held = sum(sizes[n] for n in lot)
        assert held <= goal
        assert all(held + sizes[n] > goal for n in sizes if n not in lot)
    assert drawn[0] != drawn[1] != drawn[2]
    assert set(random_matched(denoiser, frozen, 0).frozen) == drawn[0]


# --- resuming ----------------------------------------------------------------------------------------

FEW = {**SETTINGS, "attackers": ["full"], "seeds": [3], "pictures": 2, "innocent_pictures": 3}


def run(
    denoiser: Any, sides: dict[str, Side], work: Path, guards: Any = None, **changed: Any
) -> Evaluation:
    guards = [Guarded("freeze", frozen_of(denoiser))] if guards is None else guards
    return evaluate(
        denoiser,
        guards,
        **sides,
        settings=EvaluateSettings(**{**FEW, **changed}),
        work=work,
        eye=Coarse(),
    )


@pytest.fixture
def trainings(monkeypatch) -> list[Any]:
    """Counts fine-tunings."""
    calls: list[Any] = []
    real = attackers_module._train

    def counted(*args: Any, **given: Any) -> Any:
        calls.append(args)
        return real(*args, **given)

    monkeypatch.setattr(attackers_module, "_train", counted)
    return calls


def test_nothing_is_made_twice(denoiser, sides, tmp_path, trainings):
    first = run(denoiser, sides, tmp_path)
    assert len(trainings) == 4  # {none, freeze} x {illegal, innocent}
    again = run(denoiser, sides, tmp_path)
    assert len(trainings) == 4 and again.data == first.data
    assert not (tmp_path / "base.safetensors").exists()
    # Another seed adds its own cells only; so does an attacker that comes to the same.
    run(denoiser, sides, tmp_path, seeds=[3, 4], attackers=["full", "unfreeze"])
    assert len(trainings) == 8
    sides["illegal"].match = lambda pixels, subject: np.zeros(len(pixels), bool)
    changed = run(denoiser, sides, tmp_path)
    assert len(trainings) == 8
    assert row_of(changed, "none", "full")["identity_match"]["value"] == 0


@pytest.mark.parametrize(
    "changed", [{"draw_steps": 3}, {"draw_seed": 1}, {"pairs": 3}, {"attack": AttackSettings(steps=3, batch=2)}, {"guidance": 2.0}]
)  # fmt: skip
def test_other_settings_are_other_cells(denoiser, sides, tmp_path, trainings, changed):
    run(denoiser, sides, tmp_path)
    run(denoiser, sides, tmp_path, **changed)
    assert len(trainings) == 8


def test_other_pictures_masks_and_edits_are_other_cells(denoiser, sides, tmp_path, trainings):
    run(denoiser, sides, tmp_path)
    run(denoiser, sides, tmp_path, guards=[Guarded("freeze", frozen_of(denoiser)[1:])])
    assert len(trainings) == 6
    edit = edit_of(denoiser)
    run(denoiser, sides, tmp_path, guards=[Guarded("uce", edit=edit)])
    assert len(trainings) == 8
    run(
        denoiser, sides, tmp_path, guards=[Guarded("uce", edit={n: t + 1 for n, t in edit.items()})]
    )
    assert len(trainings) == 10
    run(denoiser, sides, tmp_path, guards=[Guarded("other name", edit=edit)])
    assert len(trainings) == 10
    sides["innocent"].training = features_of(denoiser, 7, 4, "a boat")
    run(denoiser, sides, tmp_path)
    assert len(trainings) == 12


@pytest.mark.parametrize("damage", ["png", "cut", "json", "other"])
def test_a_damaged_cell_is_made_again(denoiser, sides, tmp_path, trainings, damage):
    first = run(denoiser, sides, tmp_path)
    key = row_of(first, "freeze", "full")["cell"]
    sheet, told = tmp_path / f"{key}.0.png", tmp_path / f"{key}.json"
    if damage == "png":
        sheet.unlink()
    elif damage == "cut":
        sheet.write_bytes(sheet.read_bytes()[:60])
    elif damage == "json":
        told.write_text(told.read_text()[:-40])
    else:
        data = json.loads(told.read_text())
        data["run"]["seed"] = 9
        told.write_text(json.dumps(data))
    again = run(denoiser, sides, tmp_path)
    assert len(trainings) == 5
    assert (
        row_of(again, "freeze", "full")["held_out_loss"]
        == row_of(first, "freeze", "full")["held_out_loss"]
    )
    assert np.array_equal(
        again.pictures(row_of(again, "freeze", "full")),
        first.pictures(row_of(first, "freeze", "full")),
    )


def test_a_broken_attack_names_itself_and_leaves_the_base(denoiser, sides, tmp_path, monkeypatch):
    before = state(denoiser)

    def broken(denoiser: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            next(denoiser.unet.parameters()).add_(1)
        raise TrainingError("step 1: the loss is not finite")

    monkeypatch.setattr(attackers_module, "_train", broken)
    with pytest.raises(TrainingError, match="none/full, illegal domain, seed 3: step 1"):
        run(denoiser, sides, tmp_path)
    assert not moved(denoiser, before)


def test_a_loss_that_is_not_finite_is_no_figure(denoiser, sides, tmp_path, monkeypatch):
    def broken(denoiser: Any, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            next(denoiser.unet.parameters()).fill_(float("nan"))
        return attackers_module.Effort(1, 1, 1, 0.1)

    monkeypatch.setattr(attackers_module, "_train", broken)
    with pytest.raises(TrainingError, match="held-out"):
        run(denoiser, sides, tmp_path)
    assert all(torch.isfinite(p).all() for p in denoiser.unet.parameters())


def test_a_base_that_does_not_come_back_is_noticed(denoiser, sides, tmp_path, monkeypatch):
    from diffward.guard.cells import Cells

    monkeypatch.setattr(Cells, "_restore", lambda self: self.denoiser.detach())
    with pytest.raises(TrainingError, match="base is not what it was"):
        run(denoiser, sides, tmp_path)


def test_class_pictures_come_from_the_guarded_base(denoiser, sides, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}
    real = attackers_module._train

    def noted(
        denoiser: Any,
        features: Any,
        frozen: Any,
        settings: Any,
        seed: int,
        prior: Any,
        **given: Any,
    ) -> Any:
        if prior is not None:
            seen.setdefault(str(hashes(state(denoiser), [next(iter(edit))])), prior.latents.clone())
        return real(denoiser, features, frozen, settings, seed, prior, **given)

    edit = edit_of(denoiser)
    monkeypatch.setattr(attackers_module, "_train", noted)
    run(denoiser, sides, tmp_path, guards=[Guarded("uce", edit=edit)], attackers=["dreambooth"])
    bare, edited = seen.values()
    assert not torch.equal(bare, edited)
    own = copy.deepcopy(denoiser)
    own.unet.load_state_dict(edit, strict=False)
    drawn = sample(own, ["cup"] * 2, seed=0)
    assert torch.allclose(edited, denoiser.encode(drawn), atol=1e-5)


def test_galleries_stand_in_for_a_match(denoiser, sides, tmp_path):
    own = {"a": pixels_of(20, 4), "b": pixels_of(21, 4), "somebody else": pixels_of(22, 4)}
    sides["illegal"].match, sides["illegal"].galleries = None, own
    evaluation = run(denoiser, sides, tmp_path, innocent_attackers=["nobody"])
    row, eye = row_of(evaluation, "none", "full"), Coarse()
    drawn = eye.features(evaluation.pictures(row))
    known = {name: eye.features(pixels) for name, pixels in own.items()}
    hits = [gallery_match(drawn[:2], "a", known), gallery_match(drawn[2:], "b", known)]
    assert row["identity_match"]["value"] == np.concatenate(hits).mean()
    assert evaluation.data["identity_by"] == "galleries"
    reference = evaluation.pictures(evaluation.data["domains"]["illegal"]["reference"])
    assert np.array_equal(reference, np.stack([own["a"][0], own["b"][0]]))


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guards", "words"),
    [
        ([Guarded("freeze", ["no.such"])], "no tensor no.such"),
        ([Guarded("uce", edit={"no.such": torch.zeros(1)})], "no tensor no.such"),
        ([Guarded("uce", edit={"conv_in.bias": torch.zeros(3)})], "of that shape"),
        ([Guarded("a"), Guarded("a")], "twice"),
        ([Guarded("a", seed=3), Guarded("a")], "twice"),
        ([Guarded("a", seed=8)], "not among --seeds"),
        ([Guarded("none", ["conv_in.bias"])], "another name"),
    ],
)
def test_guards_that_cannot_be(denoiser, sides, tmp_path, guards, words):
    with pytest.raises(InputError, match=words):
        run(denoiser, sides, tmp_path, guards=guards)


def test_a_mask_that_leaves_nothing(denoiser, sides, tmp_path):
    with pytest.raises(InputError, match="freezes every tensor"):
        run(denoiser, sides, tmp_path, guards=[Guarded("all", list(state(denoiser)))])


@pytest.mark.parametrize(
    ("domain", "field", "value", "words"),
    [
        ("innocent", "prompts", [], "innocent domain: no prompts"),
        ("illegal", "real", np.zeros((0, 16, 16, 3), np.uint8), "illegal domain: no real"),
        ("illegal", "prompts", ["a cup"], "named by the subject"),
        ("illegal", "match", None, "who is in a picture"),
        ("illegal", "galleries", {"a": np.zeros((2, 16, 16, 3), np.uint8)}, "gallery"),
        ("innocent", "class_prompt", "", "class prompt"),
    ],
)
def test_domains_that_lack_something(denoiser, sides, tmp_path, domain, field, value, words):
    setattr(sides[domain], field, value)
    if field == "galleries":
        sides[domain].match = None
    with pytest.raises(InputError, match=words):
        run(denoiser, sides, tmp_path, attackers=["dreambooth"], innocent_attackers=["dreambooth"])


def test_held_out_means_held_out(denoiser, sides, tmp_path):
    sides["illegal"].held_out = sides["illegal"].training.of([1])
    with pytest.raises(InputError, match="held-out pictures are training pictures"):
        run(denoiser, sides, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"attackers": []}, {"attackers": ["full", "full"]}, {"attackers": ["wish"]}, {"seeds": []}, {"seeds": [-1]},
     {"pairs": 1}, {"pictures": 0}, {"guidance": -1.0}, {"resamples": 3}],
)  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(InputError):
        EvaluateSettings(**wrong)
