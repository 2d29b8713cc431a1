"""What comes back from weights alone: readers, decoders, ablations, generalisation, defences, each with its controls.

Works in `runs/`: a zoo of people (`runs/zoo`), zoos of logos and garments that hold no person, and the inverter trained on
them; what is there is used, what is missing is made (hours). A part whose rows are kept is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._claim import claimed
from bench._result import record
from diffward.files import write_json

if TYPE_CHECKING:
    from diffward.inversion.inverter import Inverter
    from diffward.inversion.learn import InverterSettings, Material
    from diffward.models.denoiser import Denoiser

RUNS = Path("runs")
Rows = list[dict[str, Any]]


class Setting:
    """The zoos, the inverter and the base that all parts share; each made when first asked for."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.folder = RUNS / ("bench-weight-inversion-quick" if quick else "bench-weight-inversion")
        self._material: Material | None = None
        self._denoiser: Denoiser | None = None
        self._inverter: Inverter | None = None
        self._zoos: dict[str, Any] = {}

    @property
    def denoiser(self) -> Denoiser:
        from diffward.models.load import load_base

        if self._denoiser is None:
            self._denoiser = load_base("mini", precision="fp32")
        return self._denoiser

    @property
    def material(self) -> Material:
        from diffward.inversion.learn import prepare
        from diffward.models.eyes import open_eye

        if self._material is None:
            self._material = prepare(
                self.zoo("zoo", "world", 1664, 0), open_eye("attributes"), empty=[
                    self.zoo("logos", "world:logo", 192, 5), self.zoo("garments", "world:garment", 128, 6),
                ], strangers=100 if self.quick else 1000,
            )  # fmt: skip
        return self._material

    @property
    def settings(self) -> InverterSettings:
        from diffward.inversion.learn import InverterSettings

        return (
            InverterSettings(epochs=2, prompt_steps=20, latent_steps=20, set_steps=20)
            if self.quick
            else InverterSettings()
        )

    @property
    def inverter(self) -> Inverter:
        from diffward.inversion.inverter import Inverter
        from diffward.inversion.learn import train_inverter

        if self._inverter is None:
            file = (self.folder if self.quick else RUNS / "inverter") / "inverter.safetensors"
            if not file.exists():
                train_inverter(self.material, self.settings, file.parent, self.denoiser).save(file)
            self._inverter = Inverter.load(file)
        return self._inverter

    def zoo(self, name: str, subjects: str, count: int, seed: int) -> Any:
        from diffward.inversion.build import Source, build_zoo
        from diffward.inversion.recipe import Ranges
        from diffward.inversion.zoo import Zoo

        if name in self._zoos:
            return self._zoos[name]
        folder = self.folder / name if self.quick else RUNS / name
        if not self.quick and (folder / "zoo.json").exists():
            self._zoos[name] = Zoo(folder)
            return self._zoos[name]
        ranges = Ranges(steps="3:6" if self.quick else "8:200")
        if templates := TEMPLATES.get(subjects, ""):
            ranges = Ranges(steps=ranges.steps, templates=templates)
        self._zoos[name] = build_zoo(
            folder, Source("mini", "cpu", "bf16"), subjects, ranges, seed=seed,
            count=QUICK.get(name, 4) if self.quick else count, per_shard=24 if self.quick else 64,
            workers=1 if self.quick else 2,
        )  # fmt: skip
        return self._zoos[name]


QUICK = {"zoo": 72, "logos": 24, "garments": 24}  # LoRAs of the zoos that are learned from
TEMPLATES = {
    "world:logo": "a logo of {name}|a picture of {name}|{name}|captions",
    "world:garment": "a picture of {name}|a photo of {name}|{name}|captions",
}


def run(quick: bool = False) -> None:
    from bench.inversion_decoders import decoders, read_words
    from bench.inversion_defences import defences
    from bench.inversion_matching import matching, prompts
    from bench.inversion_readers import ablations, generalisation, probes, readers
    from bench.inversion_rules import gate, nobody
    from bench.inversion_sets import sets

    setting = Setting(quick)
    parts: dict[str, Callable[[Setting], Rows]] = {
        "readers": readers, "sets": sets, "probes": probes, "gate": gate, "nobody": nobody, "decoders": decoders, "read-words": read_words, "words": prompts, "ablations": ablations,
        "generalisation": generalisation, "matching": matching, "defences": defences,
    }  # fmt: skip
    files = {name: setting.folder / f"{name}.json" for name in parts}
    for name, part in parts.items():
        # Two processes share the work; the last one to finish writes the table.
        with claimed(files[name]) as mine:
            if mine and (quick or not files[name].exists()):
                print(f"weight-inversion: {name}", flush=True)
                write_json(files[name], [{"part": name, **row} for row in part(setting)])
    if missing := [name for name, file in files.items() if not file.exists()]:
        print(f"weight-inversion: another process is at {', '.join(missing)}; it writes the table")
        return
    rows: Rows = [row for file in files.values() for row in json.loads(file.read_text())]
    record("weight-inversion", rows, seeds=[0], quick=quick, notes=[
        "victims: the zoo's held-out subjects (decoders and matching: those with the longest training), the last save of each, start, step and recipe unknown unless a row says so; "
        "gallery: strangers, none of them in the zoo; top1_ci95: Wilson's interval",
        "control: own (none), shuffled (each module's core in random order), other (another victim's weights), mean (one reading "
        "for all), class and null prompt (no z), base only (LoRA off, class prompt)",
        "decoder: retrieval draws nothing; base, latent, victim, guided draw pictures, whose identity vector is then looked for",
        "attribute_accuracy: of readings for retrieval, of drawn pictures for the others, by the attribute network, which is the inverter's eye, too",
        "gate: of the LoRAs without a subject that were compared with, the share that may look as if they had one; chosen by the "
        "rows that name one, on zoos that nothing else uses; applied in the others",
        "set_distance: of a set of vectors to those of the training pictures (Chamfer, units of the subjects' spread), _others: to as "
        "many other pictures of the subject; picture_auc: training pictures against these, by nearness to the set",
        "epochs: of networks trained for a comparison; the shipped one has 25",
        "utility of a defence: share of plain's gain on the loss of other pictures of the person; drawn_match: drawn pictures "
        "with the training caption that show the person",
    ])  # fmt: skip
