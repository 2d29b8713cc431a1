"""The tables of guarding: the published loop does what its description says, memory is counted right, quick runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`bench("mask_speed")`: a module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def published(bench: Any, tiny_denoiser: Any, pictures: Any) -> Callable[[], Any]:
    """Loops that are alike, each over a UNet of its own."""

    def make() -> Any:
        base = tiny_denoiser()
        g = torch.Generator().manual_seed(1)
        tuned = {
            name: p + 0.01 * torch.randn(p.shape, generator=g)
            for name, p in base.unet.named_parameters()
        }
        flags = torch.arange(len(pictures)) < 3
        return bench("_published_mask").PublishedMask(
            base, pictures.pixels(base.resolution), pictures.captions, flags, tuned, batch=4, seed=0
        )

    return make


def gradients(loop: Any, weigh: Callable[..., Any]) -> list[Any]:
    """Of the next batch's loss, by autograd alone."""
    torch.manual_seed(5)  # the autoencoder's draw
    loss = weigh(*loop.errors())
    return list(torch.autograd.grad(loss, list(loop.unet.parameters())))


def test_published_mask_step(bench: Any, published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, twin, module = published(), published(), bench("_published_mask")
    monkeypatch.setattr(module, "MASK_LR", 1e4)  # or the penalty hides what the data do
    pre = [p.detach() + (1 - m) * d for p, m, d in _state(loop)]
    before = loop.x.detach().clone().double()

    def mixed(each: Any, flag: Any) -> Any:
        there, other = flag.bool(), ~flag.bool()
        assert there.any() and other.any()
        return (each[other].mean() - each[there].mean()) / 2

    found = gradients(twin, mixed)
    torch.manual_seed(5)
    loop.mask_step()
    m = torch.sigmoid(before / module.TEMPERATURE)
    inner = torch.tensor(
        [float((d.double() * g).sum()) for d, g in zip(twin.d, found, strict=True)]
    )
    slope = m * (1 - m) / module.TEMPERATURE
    penalty = module.SPARSITY * 2 * (m.mean() - module.RATIO) / len(m)
    moved = slope * module.MASK_LR * inner
    assert moved.abs().max() > 0.1
    wanted = before - moved - slope * penalty
    assert torch.allclose(loop.x.double(), wanted, rtol=1e-3, atol=1e-3)  # 1e-5 in the means
    # theta went along: theta_pre = theta + (1 - m) d, whatever m is.
    for was, (p, now, d) in zip(pre, _state(loop), strict=True):
        assert torch.allclose(p + (1 - now) * d, was, atol=1e-5)
    assert all(p.grad is None for p in loop.unet.parameters())


def test_published_user_step(bench: Any, published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, twin, module = published(), published(), bench("_published_mask")
    monkeypatch.setattr(module, "USER_LR", 1.0)  # at 1e-5 a step is near rounding
    theta = [p.detach().clone() for p in loop.unet.parameters()]
    pre = [p.detach() + (1 - m) * d for p, m, d in _state(loop)]
    found = gradients(twin, lambda each, _: each.mean())
    lr = module.USER_LR
    torch.manual_seed(5)
    loop.user_step()
    for was, g, (p, m, d), old in zip(theta, found, _state(loop), twin.d, strict=True):
        assert torch.allclose(p - was, -lr * (1 - m) ** 2 * g, rtol=1e-3, atol=1e-6)
        assert torch.allclose(old - d, lr * -(1 - m) * g, rtol=1e-3, atol=1e-6)
    assert max(float((p.detach() - was).abs().max()) for p, was in zip(loop.unet.parameters(), theta, strict=True)) > 1e-3  # fmt: skip
    for was, (p, m, d) in zip(pre, _state(loop), strict=True):
        assert torch.allclose(p + (1 - m) * d, was, atol=1e-5)  # theta_pre never moves


def _state(loop: Any) -> list[Any]:
    mask = torch.sigmoid(loop.x.detach() / 0.2)
    return list(zip(loop.unet.parameters(), mask, loop.d, strict=True))


def test_ledger_counts_weights_alone(bench: Any, tmp_path: Path) -> None:
    from diffward.guard.stored import Stored

    module = bench("_ledger")
    weight, bias = torch.randn(64, 32), torch.randn(64)
    whole = weight.nbytes + bias.nbytes
    stored = Stored.write(tmp_path / "w.safetensors", {"w": weight})
    ranges = [part for part, _ in module.mappings(stored.path)]
    ledger = module.Ledger([weight, bias], [weight, bias], ranges)
    assert ledger.now == whole
    with ledger:
        activation = weight.new_ones(7, 64) * 2
        assert ledger.now == whole
        gradient = weight * 3
        view = gradient.t().reshape(32, 64)[:5]
        assert ledger.now == whole + weight.nbytes
        with ledger.updating():
            many = torch.zeros(1000)  # of no weight's shape
        assert ledger.now == whole + weight.nbytes + many.nbytes
        del many, gradient
        assert ledger.now == whole + weight.nbytes  # the view holds it
        del view
        assert ledger.now == whole
        with ledger.updating():
            read = stored["w"].flatten()
            assert ledger.now == whole + (0 if ranges else weight.nbytes)
    assert ledger.peak == whole + weight.nbytes + 4000
    assert activation.shape == (7, 64) and read.numel() == weight.numel()


def test_reading_a_file_of_weights_takes_no_private_memory(bench: Any, tmp_path: Path) -> None:
    from diffward.guard.stored import Stored

    module = bench("_ledger")
    stored = Stored.write(tmp_path / "w.safetensors", {"w": torch.randn(512, 512)})
    if not module.mappings(stored.path):
        pytest.skip("the system does not tell what it maps")
    weight = stored["w"]
    assert float(weight.sum()) and sum(own for _, own in module.mappings(stored.path)) == 0
    weight.add_(1)  # whoever writes pays
    assert sum(own for _, own in module.mappings(stored.path)) >= weight.nbytes


def test_masks_of_the_cost_table(bench: Any, denoiser: Any) -> None:
    from diffward.guard.cost import training_costs
    from diffward.models.parameters import parameters_of

    module = bench("freeze_cost")
    own = parameters_of(denoiser.unet)
    names, total = list(own), sum(p.numel() for p in own.values())
    order = dict(zip(names, module.order_of_use(denoiser).tolist(), strict=True))
    assert order["conv_out.weight"] == max(order.values())
    assert order["time_embedding.linear_1.weight"] < order["conv_in.bias"] < order["conv_norm_out.weight"]  # fmt: skip
    early = module.frozen_by(module.Case(0.3, mask="early"), denoiser).tolist()
    assert sum(early) == round(0.3 * len(names))
    frozen = [order[n] for n, one in zip(names, early, strict=True) if one]
    assert max(frozen) <= min(order[n] for n, one in zip(names, early, strict=True) if not one)
    costs = training_costs(denoiser)
    costly = module.frozen_by(module.Case(0.3, mask="costly"), denoiser)
    assert costs[costly].min() >= costs[~costly].max()
    by = module.frozen_by(module.Case(0.3, "parameters"), denoiser).tolist()
    assert sum(own[n].numel() for n, one in zip(names, by, strict=True) if one) <= 0.3 * total
    assert not module.frozen_by(module.FREE, denoiser).any()


@pytest.mark.slow
def test_mask_speed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _quick(bench("mask_speed"), "mask-speed", monkeypatch)
    found = {row["user_optimizer"]: row for row in rows}
    assert set(found) == {"factored", "adamw"}
    for row in rows:
        assert (row["tensors"], row["parameters"], row["batch"]) == (686, 8_605_284, 16)
        assert 0 < row["time_ratio_range"][0] <= row["time_ratio"] <= row["time_ratio_range"][1]
        assert row["base_private"] in (0, None)
        assert 3 < row["published_copies"] < 3.3  # theta, d, all gradients
    assert 2 < found["factored"]["copies_at_peak"] <= 2.3
    assert 4 < found["adamw"]["copies_at_peak"] < 4.3  # two moments


@pytest.mark.slow
def test_freeze_cost(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free, *rows = _quick(bench("freeze_cost"), "freeze-cost", monkeypatch)
    assert (free["rho"], free["memory_ratio"], free["time_ratio"]) == (0, 1, 1)
    masks = {row["mask"]: row for row in rows if "mask" in row}
    assert set(masks) == {"random", "costly", "early"}
    keys = {"rho", "by", "parameter_share", "memory_ratio", "time_ratio", "mask"}
    for row in masks.values():
        assert keys <= row.keys()
        assert row["tensor_share"] == pytest.approx(0.3, abs=1e-3)
        assert 0 < row["memory_ratio"] < 1
    assert masks["costly"]["parameter_share"] > masks["random"]["parameter_share"]
    assert masks["costly"]["memory_ratio"] < masks["random"]["memory_ratio"]
    assert [row["stage"] for row in rows if "stage" in row] == ["tune", "update"]
    assert all(row["fits_24_gib"] for row in rows if "stage" in row)


def _quick(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows that a quick run hands to `record`."""
    told: list[dict[str, Any]] = []

    def record(title: str, rows: list[dict[str, Any]], **options: Any) -> None:
        assert (title, options["quick"]) == (name, True)
        told.extend(rows)

    monkeypatch.setattr(module, "record", record)
    module.run(quick=True)
    return told


def test_of_the_rows_over_seeds_those_with_more_of_them_stay(bench: Any) -> None:
    most_seeds = bench("freezeasguard").most_seeds
    five = {"method": "freeze", "attacker": "full", "seeds": 5}
    two = {"method": "freeze", "attacker": "full", "seeds": 2}
    other = {"method": "freeze", "attacker": "lora", "seeds": 2}
    assert most_seeds([two, other], [five]) == [five, other]
    again = five | {"identity_match": 0.5}
    assert most_seeds([again], [five]) == [again]


def test_a_mean_whose_seeds_came_out_otherwise_is_known(bench: Any) -> None:
    freezeasguard = bench("freezeasguard")

    def row(method: str, seed: int, match: float) -> dict[str, Any]:
        return {"table": "1", "method": method, "attacker": "full", "rho": 0.3, "subjects": 5, "base": "mini",
                "innocent": "neon garments", "seed": seed, "steps": 100, "illegal": {"identity_match": match}}  # fmt: skip

    recorded = [row("freeze", 1, 0.9), row("freeze", 2, 0.8), row("random", 1, 1.0)]
    now = [
        row("freeze", 1, 0.9),
        row("freeze", 2, 0.7),
        row("random", 1, 1.0),
        row("random", 3, 0.5),
    ]
    assert freezeasguard.came_otherwise(now, recorded) == {("freeze", "full")}
    assert freezeasguard.came_otherwise(recorded, recorded) == set()


def test_contrasts_come_from_the_hits_that_rows_carry(bench: Any) -> None:
    def row(method: str, seed: int, hits: str) -> dict[str, Any]:
        return {"table": "1", "method": method, "attacker": "full", "seed": seed, "hits": [hits, hits],
                "innocent_quality": 0.9}  # fmt: skip

    rows = [row(m, s, h) for s in (1, 2, 3) for m, h in (("none", "1111"), ("freeze", "1000"))]
    without = {k: v for k, v in row("none", 4, "0000").items() if k != "hits"}  # of an older table
    none, freeze = bench("freezeasguard").contrasts([*rows, without])
    assert (none["identity_match"], none["seeds"]) == (1.0, 3)
    assert (freeze["identity_match"], freeze["vs_none"]) == (0.25, -0.75)
    assert freeze["vs_none_ci95"][0] <= -0.75 <= freeze["vs_none_ci95"][1] < 0


def test_fresh_seeds_stand_apart(bench: Any) -> None:
    """An effect that the first five seeds alone have is not lent to the fresh ones, nor they to it."""
    module = bench("freezeasguard")

    def row(method: str, seed: int, hits: str) -> dict[str, Any]:
        return {"table": "1", "method": method, "attacker": "full", "seed": seed, "hits": [hits, hits],
                "innocent_quality": 0.9}  # fmt: skip

    rows = [row("random", s, "1111") for s in (*module.SEEDS, *module.FRESH)]
    rows += [row("freeze", s, "1000") for s in module.SEEDS]
    rows += [row("freeze", s, "1111") for s in module.FRESH]
    first = module.contrasts(rows)[1]
    fresh = module.contrasts(rows, module.FRESH, module.OVER_FRESH)[1]
    assert (first["table"], first["seeds"], first["vs_random"]) == (module.OVER_SEEDS, 5, -0.75)
    assert (fresh["table"], fresh["seeds"], fresh["vs_random"]) == (module.OVER_FRESH, 3, 0.0)


def test_shares_are_compared_each_with_its_own_random_mask(bench: Any) -> None:
    module = bench("freezeasguard")

    def row(method: str, seed: int, hits: str, rho: float) -> dict[str, Any]:
        return {"table": "2", "method": method, "attacker": "full", "seed": seed, "hits": [hits, hits], "rho": rho,
                "innocent_quality": 0.9}  # fmt: skip

    rows = [row("none", s, "1111", 0.0) for s in (1, 2)] + [row("random", 1, "1111", 0.4)]
    for share, (lots, mask) in {0.1: ("1111", "1110"), 0.8: ("1000", "1110")}.items():
        rows += [
            row(m, s, h, share) for s in (1, 2) for m, h in (("random", lots), ("freeze", mask))
        ]
    found = {(r["rho"], r["method"]): r for r in module.by_share(rows)}
    assert set(found) == {(share, m) for share in (0.1, 0.8) for m in ("random", "freeze")}
    assert found[0.1, "freeze"]["vs_random"] == -0.25 and found[0.8, "freeze"]["vs_random"] == 0.5
    assert found[0.8, "random"]["vs_none"] == -0.75
    assert {r["table"] for r in found.values()} == {module.OVER_SHARES}


def test_a_unit_is_there_once_all_its_guards_and_attackers_have_rows(bench: Any) -> None:
    freezeasguard = bench("freezeasguard")
    unit = freezeasguard.Unit("1", 2, ("freeze", "uce"), ("lora", "full"))
    rows = [
        {"table": "1", "method": m, "attacker": a, "rho": r, "subjects": 5, "base": "mini",
         "innocent": "neon garments", "seed": 2}
        for m, r in (("freeze", 0.3), ("uce", 0.0)) for a in ("lora", "full")
    ]  # fmt: skip
    is_there = freezeasguard.is_there
    assert is_there(unit, rows) and not is_there(unit, rows[1:])
    assert not is_there(unit, [row | {"seed": 1} for row in rows])
    assert not is_there(freezeasguard.Unit("1", 2, ("freeze",), ("full",), share=0.1), rows)


@pytest.mark.parametrize(("kind", "style"), [("garment", "neon"), ("logo", "sketch")])
def test_what_a_caption_says_is_true_of_its_picture(bench: Any, kind: str, style: str) -> None:
    from diffward.models.mini import world

    said_of, readable = bench("guard_cases").said_of, bench("guard_cases").READABLE[kind]
    said = 0
    for i in range(40):
        drawing = world.sample([5, i], domain=kind, style=style)
        wishes = said_of(kind, drawing.caption)
        own = {name: drawing.attributes[name] for name in readable}
        assert {k: v for k, v in wishes.items() if k != "domain"}.items() <= own.items()
        said += len(wishes) - 1
    assert said > 20


# --- mask_learns: the interval ------------------------------------------------------------------


def test_what_an_interval_changes(bench: Any) -> None:
    learns, usual = bench("mask_learns"), bench("guard_cases").INTERVAL
    asked = []

    def mask(place: Any, *, seed: int | None = None, interval: int = usual) -> Any:
        asked.append((seed, interval))
        scores = torch.arange(40.0)
        losses = {
            "base": {"illegal": 1.0, "innocent": 2.0}, "tuned": {"illegal": 0.5, "innocent": 1.0},
            "masked": {"illegal": 0.75, "innocent": 1.0},
        }  # fmt: skip
        return SimpleNamespace(
            scores=scores if interval == usual else -scores, facts={"losses": losses}
        )

    learned = SimpleNamespace(mask=mask, sizes=bench("guard_cases").QUICK, work=Path("nowhere"))
    same, other = learns.by_interval(learned, (usual, 1))
    assert same["method"] == f"freeze, an update every {usual} steps"
    assert same["like_default"] == pytest.approx(1) and other["like_default"] == pytest.approx(-1)
    for row in (same, other):
        assert row["seeds"] == 2 and row["top30_overlap"] == 1 and row["tensors"] == 40
        assert row["illegal_undone"] == pytest.approx(0.5) and row["innocent_undone"] == 0
    # The place's own seed is told as None: that is the mask which the other tables have.
    assert set(asked) == {(seed, k) for seed in (None, 2) for k in (usual, 1)}
