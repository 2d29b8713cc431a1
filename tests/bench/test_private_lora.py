"""What `private-lora` stands on: its pictures and sides, shared work, and what it reads off a method."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bench("private_cases")`: a module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"bench.{name}")


def test_every_case_has_a_folder_of_its_own(bench: Any) -> None:
    cases = bench("private_cases")
    every = [case for share in cases.SHARES for case in share.cases()]
    assert len({case.name for case in every}) == len(every)
    settings = {}
    for case in every:  # nor do two trainings share a checkpoint
        assert settings.setdefault(case.training, case.settings) == case.settings
    for share in cases.SHARES:
        seeds = [case.seed for case in share.cases()]
        assert seeds == sorted(seeds)


def test_sides_are_what_the_sizes_say(bench: Any, tmp_path: Path) -> None:
    from diffward.data import near_duplicate_pairs

    cases = bench("private_cases")
    sizes = cases.Sizes(2, 5, 2, 4, 3)
    found = cases.people_material(tmp_path / "people", 3, sizes)
    again = cases.people_material(tmp_path / "people", 3, sizes)
    other = cases.people_material(tmp_path / "others", 4, sizes)
    assert found.manifest == again.manifest
    assert not set(found.people) & set(other.people)
    assert not set(found.pictures.hashes) & set(other.pictures.hashes)
    assert near_duplicate_pairs(found.pictures) == []
    auxiliary = set(found.manifest.auxiliary)
    counts = [len(side) for side in (found.manifest.members, found.sides.members, found.sides.non_members)]  # fmt: skip
    assert counts == [10, 6, 8]
    # A free draw: as many of each person on either side would bias cross-fitted attacks.
    shares = {
        sum(p.sha256 in found.manifest.members for p in material.pictures if name in p.caption)
        for seed in range(6)
        for material in [
            found if seed == 3 else cases.people_material(tmp_path / f"p{seed}", seed, sizes)
        ]
        for name in material.people
    }
    assert len(shares) > 1
    assert not auxiliary & {*found.sides.members.hashes, *found.sides.non_members.hashes}


def test_captions_are_read_as_they_were_written(bench: Any) -> None:
    import numpy as np

    from diffward.models.mini import world
    from diffward.models.mini.attributes import SCENE, Person

    cases = bench("private_cases")
    person = Person.random(np.random.default_rng(0))
    for drawing in world.portraits(person, 20, 5, name="kavo", mention=1.0):
        scene = {name: drawing.attributes[name] for name in SCENE}
        assert cases.named_attributes(drawing.caption) == scene
    assert cases.named_attributes("a portrait of kavo") == {}


def test_a_claim_ends_with_its_process(bench: Any, tmp_path: Path) -> None:
    claimed = bench("_claim").claimed
    code = (
        "import sys, time; from pathlib import Path; from bench._claim import claimed\n"
        "with claimed(Path(sys.argv[1])) as mine:\n    print(mine, flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "work"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout and other.stdout.readline() == "True\n"
        with claimed(tmp_path / "work") as mine:
            assert not mine
        assert (tmp_path / "work.claim").read_text() == f"{other.pid}\n"
        with claimed(tmp_path / "more") as mine:
            assert mine
    finally:
        other.kill()
        other.wait()
    with claimed(tmp_path / "work") as mine:
        assert mine


@pytest.mark.parametrize("name", ["mp", "smp"])
def test_the_effective_weight_is_that_of_the_gradient(bench: Any, name: str) -> None:
    from diffward.finetune import METHODS

    method = METHODS[name].obj()
    method.weight, method.paper, method._seen = 0.3, False, []
    pressure = bench("private_utility").Pressure(method)
    assert pressure.effective is None
    loss = torch.tensor([0.05, 0.2], requires_grad=True)
    ce = torch.tensor([0.4, 1.5], requires_grad=True)
    of_loss, of_ce = torch.autograd.grad(method.objective(loss, ce).sum(), [loss, ce])
    assert pressure.effective == pytest.approx(float((-of_ce / of_loss).mean()), rel=1e-4)


def test_a_written_unet_is_the_one_that_was_trained(
    bench: Any, tiny_denoiser: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    denoiser = tiny_denoiser()
    bench("private_lora").write_unet(denoiser, tmp_path / "new" / "unet.safetensors")
    found, own = load_file(tmp_path / "new" / "unet.safetensors"), denoiser.unet.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["unet.safetensors"]


def test_the_curve_shows_means_where_there_are_any(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[Any, Any]] = []
    plot = Axes.plot

    def spy(self: Axes, x: Any, y: Any, *rest: Any, **more: Any) -> Any:
        drawn.append((x, y))
        return plot(self, x, y, *rest, **more)

    monkeypatch.setattr(Axes, "plot", spy)
    rows = bench("private_rows")

    def row(method: str, seed: Any, auc: float, passes: float = 40.0) -> dict[str, Any]:
        return {
            "dataset": "mini people", "method": method, "settings": "rank 8", "seed": seed, "exposure": passes,
            "worst_auc": auc, "gain_kept": 1.0 - auc, "identity_match": 0.0,
        }  # fmt: skip

    single = [row("plain", 0, 0.9), row("plain", 0, 0.7, 5.0), row("smp", 0, 0.8)]
    means = [row("plain", "all", 0.95), row("plain", "all", 0.6, 5.0)]
    rows.draw_curve([*single, *means, {"method": "smp", "base": "sd15"}], tmp_path / "curve.png")
    assert drawn[0] == ([0.6, 0.95], pytest.approx([0.4, 0.05]))  # by passes, the means alone
    assert all(x != 0.8 for x, _ in drawn)
    drawn.clear()
    rows.draw_curve(single, tmp_path / "single.png")
    assert drawn[0][0] == [0.7, 0.9]
    assert (0.8, pytest.approx(0.2)) in drawn
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "single.png"]
    rows.draw_curve([row("smp", 0, 0.8)], tmp_path / "none.png")  # nothing to stand above
    assert not (tmp_path / "none.png").exists()
