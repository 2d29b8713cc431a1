"""Readers of weights: floor and encoder, with controls, without their parts, and on recipes that they never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.weight_inversion import Rows, Setting
    from diffward.inversion.data import Data
    from diffward.inversion.inverter import Inverter
    from diffward.inversion.learn import InverterSettings, Material

SEEDS = (0,)
EPOCHS = 4  # of the networks that are compared; the shipped one has 25
CELL_EPOCHS = 3


def row(
    method: str, found: Tensor, data: Data, inverter: Inverter, *, control: str = "own", accuracy: float | None = None,
    decoder: str = "retrieval", step: str = "unknown", defence: str = "none", seed: int = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of the table: what was read (n, k) of victims, looked for among strangers."""
    from diffward.inversion.judge import retrieve

    figures = retrieve(found, inverter.standard_identity(data.identity), inverter.gallery).figures()
    return {
        "method": method, "decoder": decoder, "control": control, "timestep_embedding": step, "defence": defence,
        "seed": seed, **figures, "attribute_accuracy": accuracy, "utility": None, **more,
    }  # fmt: skip


def readers(setting: Setting) -> Rows:
    """Floor and encoder on all victims, with every control; the step told and not told."""
    from diffward.inversion.judge import (
        CONTROLS,
        attribute_accuracy,
        controlled,
        floor_identity,
    )

    inverter, material = setting.inverter, setting.material
    # Validation subjects have not been learned from, either, and nothing was chosen by them.
    data = material.test.join(material.valid).last()
    reading = inverter.read(data.tokens)
    told = inverter.read(data.tokens, data.log_steps)
    mixed = inverter.read(data.tokens.shuffled())
    size = inverter.facts.identity
    rows: Rows = []
    for control in CONTROLS:
        accuracy = attribute_accuracy({"own": reading, "shuffled": mixed}[control], data.labels) if control in ("own", "shuffled") else None  # fmt: skip
        rows.append(row("encoder", controlled(reading.identity, mixed.identity, control), data, inverter, control=control, accuracy=accuracy))  # fmt: skip
        floors = floor_identity(reading, size), floor_identity(mixed, size)
        rows.append(
            row(
                "floor (ridge)",
                controlled(*floors, control),
                data,
                inverter,
                control=control,
                step="none",
            )
        )
    rows.append(
        row(
            "encoder",
            told.identity,
            data,
            inverter,
            accuracy=attribute_accuracy(told, data.labels),
            step="told",
        )
    )
    rows += [_numbers(inverter, material, data, name) for name in ("log_steps", "log_pictures")]
    rows += spectral(material, data)
    return rows


def _numbers(inverter: Inverter, material: Material, data: Data, name: str) -> dict[str, Any]:
    told = inverter.facts.held_out[name]
    return {"method": "encoder", "decoder": name, "control": "own", "victims": told["victims"], "mae": told["mae"], "constant_mae": told["constant_mae"]}  # fmt: skip


def spectral(material: Material, data: Data) -> Rows:
    """Dataset size by DSiRe's nearest spectra: of all recipes, and of one rank and similar lengths."""
    from diffward.inversion.spectrum import Constant, Spectral

    train = material.train.last()
    rows = []
    for name, keep in (
        ("all recipes", lambda r: True), ("rank 8, 50 steps and more", lambda r: r.recipe["rank"] == 8 and r.step >= 50),
    ):  # fmt: skip
        known = train.of([i for i, r in enumerate(train.rows) if keep(r)])
        asked = data.of([i for i, r in enumerate(data.rows) if keep(r)])
        if len(known) < 2 or not len(asked):
            continue
        truth = asked.log_pictures
        found = (
            Spectral.fit(known.tokens, known.log_pictures.exp().round())
            .predict(asked.tokens, "median")
            .log()
        )
        constant = Constant.fit(known.log_pictures.exp()).predict(asked.tokens).log()
        rows.append({
            "method": f"nearest spectra ({name})", "decoder": "log_pictures", "control": "own", "victims": len(asked),
            "mae": float((found - truth).abs().mean()), "constant_mae": float((constant - truth).abs().mean()),
        })  # fmt: skip
    return rows


def probes(setting: Setting) -> Rows:
    """Simpler readers still: principal components and least squares; ridge on one module, the best by validation."""
    from diffward.inversion.floor import Floor
    from diffward.inversion.judge import retrieve

    material, inverter = setting.material, setting.inverter
    train, valid, data = (one.last() for one in (material.train, material.valid, material.test))
    wanted = inverter.standard_identity(train.identity)
    x = train.tokens.cores.float().flatten(1)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean) @ (x - mean).T)
    rows: Rows = []
    for count in (32, 128, 512):
        if count >= len(train):
            continue
        turn = (x - mean).T @ vectors[:, -count:] / values[-count:].clamp_min(1e-9).sqrt()
        weight = torch.linalg.lstsq((x - mean) @ turn, wanted).solution
        found = (data.tokens.cores.float().flatten(1) - mean) @ turn @ weight
        rows.append(row(f"{count} principal components", found, data, inverter, step="none"))
    names, best = inverter.basis.modules, (-1.0, 0, torch.empty(0))
    own = inverter.standard_identity(valid.identity)
    for m in range(2 if setting.quick else len(names)):
        floor, _ = Floor.fit(train.tokens.cores[:, m : m + 1], wanted, train.groups)
        hits = retrieve(floor(valid.tokens.cores[:, m : m + 1]), own, inverter.gallery).figures()[
            "top10"
        ]
        if hits > best[0]:
            best = hits, m, floor(data.tokens.cores[:, m : m + 1])
    rows.append(
        row(
            f"ridge on {names[best[1]].removeprefix('unet.')} alone",
            best[2],
            data,
            inverter,
            step="none",
        )
    )
    return rows


def ablations(setting: Setting) -> Rows:
    """What the parts are worth: networks trained anew without them, all for as many steps."""
    from diffward.inversion.judge import attribute_accuracy

    material = setting.material
    data = material.test.last()
    base = replace(setting.settings, epochs=min(EPOCHS, setting.settings.epochs), set_steps=0)
    cases: dict[str, InverterSettings] = {
        "encoder, whole": base, "encoder, no step token": replace(base, step_token=False),
        "encoder, last saves only": replace(base, saves="last", epochs=base.epochs * 3),
        "encoder, no KL": replace(base, kl=0.0), "encoder, no floor": replace(base, floor=False),
        "encoder, no noise": replace(base, noise=0.0),
    }  # fmt: skip
    rows: Rows = []
    for name, settings in cases.items():
        for seed in SEEDS[:1] if setting.quick else SEEDS:
            inverter = _trained(
                material,
                replace(settings, seed=seed),
                setting.folder / "ablations" / f"{name}-{seed}",
            )
            reading = inverter.read(data.tokens)
            rows.append(row(name, reading.identity, data, inverter, accuracy=attribute_accuracy(reading, data.labels), step="unknown" if settings.step_token else "none", seed=seed, epochs=settings.epochs))  # fmt: skip
            if settings.step_token:
                told = inverter.read(data.tokens, data.log_steps)
                rows.append(row(name, told.identity, data, inverter, accuracy=attribute_accuracy(told, data.labels), step="told", seed=seed, epochs=settings.epochs))  # fmt: skip
    rows += [_paper(setting, data, seed) for seed in SEEDS[:1]]
    rows += [
        row(f"floor, {name}", found, data, setting.inverter, step="none")
        for name, found in _floors(setting, data)
    ]
    return rows


def _paper(setting: Setting, data: Data, seed: int) -> dict[str, Any]:
    """The paper's encoder on raw factors, with our loss and heads."""
    from diffward.inversion.encoder import Heads
    from diffward.inversion.fit import fit_encoder
    from diffward.inversion.paper import PaperEncoder, factor_lengths, raw_factors

    material, inverter = setting.material, setting.inverter
    train = material.train.of(
        [i for i, there in enumerate(material.train.subject.tolist()) if there]
    )
    raw, asked = (raw_factors(material.zoo, one.rows) for one in (train, data))
    torch.manual_seed(seed)
    encoder = PaperEncoder(factor_lengths(material.zoo), 96)
    heads = Heads(96, inverter.facts.identity, inverter.facts.attributes)
    settings = replace(setting.settings, seed=seed, lr=1e-3, epochs=1 if setting.quick else EPOCHS)
    fit_encoder(
        heads, encoder, lambda rows, log_step: encoder({k: v[rows] for k, v in raw.items()}, log_step), train,
        inverter.standard_identity(train.identity), settings, setting.folder / "paper", f"paper {seed}",
    )  # fmt: skip
    encoder.eval()
    with torch.no_grad():
        parts = [
            encoder({k: v[i] for k, v in asked.items()})[0]
            for i in torch.arange(len(data)).split(64)
        ]
        found = heads(torch.cat(parts))
    hits = [
        found[f"attribute {n}"].argmax(1) == data.labels[:, i]
        for i, n in enumerate(inverter.facts.attributes)
    ]
    return row(
        "paper's encoder, raw factors", found["identity"], data, inverter, accuracy=float(torch.stack(hits).float().mean()), seed=seed
    )  # fmt: skip


def _floors(setting: Setting, data: Data) -> Iterator[tuple[str, Tensor]]:
    """The floor on the last saves only, on a tenth of the LoRAs, on raw factors instead of the canonical form."""
    from diffward.inversion.floor import Floor

    material, inverter = setting.material, setting.inverter
    train = material.train.of(
        [i for i, there in enumerate(material.train.subject.tolist()) if there]
    )
    last = material.train.last()

    def fit(some: Data) -> Tensor:
        floor, _ = Floor.fit(
            some.tokens.cores, inverter.standard_identity(some.identity), some.groups
        )
        return floor(data.tokens.cores)

    yield "all saves", fit(train)
    yield "last saves only", fit(last)
    for share in (0.1, 0.3):
        some = sorted(set(last.groups))[: max(20, int(share * len(set(last.groups))))]
        yield (
            f"last saves of {len(some)} LoRAs",
            fit(last.of([i for i, g in enumerate(last.groups) if g in set(some)])),
        )
    known = _raw(material, last, inverter), _raw(material, data, inverter)
    floor, _ = Floor.fit(known[0], inverter.standard_identity(last.identity), last.groups)
    yield "raw factors, last saves", floor(known[1])


def _raw(material: Material, data: Data, inverter: Inverter) -> Tensor:
    """Raw factors in the same bases: left^T B and A right, padded to rank 16, of norm 1; (n, M, 16, p + q)."""
    from torch.nn.functional import pad

    basis, found = inverter.basis, [torch.empty(0)] * len(data)
    for numbers, tensors in material.zoo.shards(data.rows):
        parts = []
        for name in basis.modules:
            up = (basis.left[name].T @ tensors[f"{name}.up"]).mT
            both = torch.cat([up, tensors[f"{name}.down"] @ basis.right[name]], -1)
            both = both / both.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
            parts.append(pad(both, (0, 0, 0, 16 - both.shape[1])))
        stacked = torch.stack(parts, 1)
        for place, number in enumerate(numbers):
            found[number] = stacked[place]
    return torch.stack(found)


def generalisation(setting: Setting) -> Rows:
    """Floor and encoder, trained without a cell of the recipes, on the victims of that cell; with it beside."""
    material, inverter = setting.material, setting.inverter
    data = material.test.last()
    cells: dict[str, Callable[[Any], bool]] = {
        "rank 1": lambda r: r.recipe["rank"] == 1, "rank 16": lambda r: r.recipe["rank"] == 16,
        "gaussian init": lambda r: r.recipe["init"] == "gaussian", "uniform init": lambda r: r.recipe["init"] == "uniform",
        "lion": lambda r: r.recipe["optimizer"] == "lion", "lr 1.8e-3 and more": lambda r: r.recipe["lr"] >= 1.8e-3,
        "100 steps and more": lambda r: r.recipe["steps"] >= 100, "below 20 steps": lambda r: r.recipe["steps"] < 20,
        "one or two pictures": lambda r: r.recipe["pictures"] <= 2, "ten pictures and more": lambda r: r.recipe["pictures"] >= 10,
        "own captions": lambda r: r.recipe["template"] == "captions", "the word alone": lambda r: r.recipe["template"] == "{name}",
    }  # fmt: skip
    rows: Rows = []
    everyone = list(range(len(material.train)))
    whole = _without(setting, everyone, data, "nothing left out")
    for name, inside in cells.items():
        asked = data.of([i for i, r in enumerate(data.rows) if inside(r)])
        left = [
            i
            for i, r in enumerate(material.train.rows)
            if not (material.train.subject[i] and inside(r))
        ]
        people = len({material.train.rows[i].identity for i in left if material.train.subject[i]})
        if len(asked) < 3 or people < 20:
            continue
        places = [i for i, r in enumerate(data.rows) if inside(r)]
        known = {method: vectors[places] for method, vectors in whole.items()}
        for held, found in (
            ("in the zoo", known),
            ("held out", _without(setting, left, asked, name)),
        ):
            rows += [
                row(
                    method,
                    vectors,
                    asked,
                    inverter,
                    recipe=f"{name}, {held}",
                    epochs=CELL_EPOCHS,
                    step="unknown" if method == "encoder" else "none",
                )
                for method, vectors in found.items()
            ]
    return rows


def _without(setting: Setting, left: list[int], asked: Data, name: str) -> dict[str, Tensor]:
    material = replace(setting.material, train=setting.material.train.of(left))
    settings = replace(
        setting.settings, epochs=min(CELL_EPOCHS, setting.settings.epochs), set_steps=0
    )
    inverter = _trained(
        material, settings, setting.folder / "generalisation" / name.replace(" ", "-")
    )
    reading = inverter.read(asked.tokens)
    # In the units of the shipped inverter: they differ by a shift and a factor.
    size, own = inverter.facts.identity, setting.inverter
    return {
        method: own.standard_identity(vectors * inverter.identity_spread + inverter.identity_mean)
        for method, vectors in (
            ("encoder", reading.identity),
            ("floor (ridge)", reading.floor[:, :size]),
        )
    }


def _trained(material: Material, settings: InverterSettings, folder: Any) -> Inverter:
    from diffward.inversion.learn import train_inverter

    return train_inverter(material, settings, folder)
