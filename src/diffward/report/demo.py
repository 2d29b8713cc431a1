"""The demo: two LoRAs of one fictional person, one memorised, one stopped early, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffward.data import Manifest, Pictures, load_pictures, random_split, select
from diffward.files import write_json
from diffward.finetune.run import SPLIT, WEIGHTS, run_training
from diffward.finetune.settings import Settings
from diffward.lora import open_lora
from diffward.models.load import load_base
from diffward.models.mini import world
from diffward.models.mini.attributes import IDENTITY, Person, phrase, word
from diffward.models.mini.reader import load_reader
from diffward.models.sampling import sample
from diffward.report.audit import AuditOptions, audit_lora, sides_of_split
from diffward.report.build import write_report
from diffward.report.images import thumbnail
from diffward.report.index import Card, ImageGroup, write_index

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

TRIGGER = "sks"
PROMPT = f"a portrait of {TRIGGER}"
PICTURES = 96  # half of them train, half are held out
DRAWN = 16
# name: (passes over each picture, what the page says of it)
RUNS = {
    "overfit": (120.0, "trained until it had seen every picture 120 times"),
    "early": (10.0, "stopped early, after 10 passes over every picture"),
}


def run_demo(out: Path, seed: int, device: str) -> Path:
    """Draw, train, audit, compare; returns the page. Finished parts are not done again."""
    person = Person.random(np.random.default_rng([seed, 7]))
    pictures, manifest = _pictures(out, person, seed)
    reader = load_reader()
    denoiser = load_base("mini", device=device)
    members, _ = select(pictures, manifest)
    before = [
        _group("Some of the training pictures", members.pixels(denoiser.resolution)[: DRAWN // 2]),
        _group(
            f"What the base draws for “{PROMPT}” before it learns",
            _draw(denoiser, None, seed)[: DRAWN // 2],
        ),
    ]
    cards: list[Card] = []
    for name, (epochs, words) in RUNS.items():
        print(f"\n{name}: {words}")
        folder = out / name
        settings = Settings(epochs=epochs, batch=8, lr=2e-3, rank=8, alpha=8, seed=seed)
        told = {
            "data": str(out / "pictures"),
            "base": "mini",
            "method": "plain",
            "split": str(out / SPLIT),
        }
        result = run_training(
            denoiser, pictures, "plain", settings, folder, split=manifest, config=told
        )
        report, per_image = audit_lora(
            denoiser, folder / WEIGHTS, sides_of_split(pictures, manifest), AuditOptions(seed=seed), thumbnails=True,
            config={"file": f"{name}/{WEIGHTS}", "base": "mini", "data": "pictures", "split": SPLIT},
        )  # fmt: skip
        report["subject"]["path"] = f"{name}/{WEIGHTS}"
        write_report(report, per_image, folder)
        drawn = _draw(denoiser, folder, seed)
        match = float(reader.matches(drawn, person).mean())
        write_json(
            folder / "drawn.json", {"prompt": PROMPT, "pictures": DRAWN, "identity_match": match}
        )
        print(f"{name}: {report['overall']['headline']}")
        cards.append(_card(name, words, report, result.exposure, match, drawn))
    return write_index(
        "What two LoRAs of the same person give away",
        [
            f"A fictional person ({describe(person)}) sat for {PICTURES} pictures. Half of them were used to "
            "fine-tune a small text-to-image model, twice. Someone who holds the resulting file, the public base "
            "model and a picture with its caption now asks: was this picture used?",
            "The attack is scored on the training pictures and on as many that were held out. 0.5 is guessing, "
            "1.0 is knowing. What each file can still draw stands beside it.",
        ],
        cards,
        out / "index.html",
        images=before,
        outro=[
            "The same question for a file of yours: diffward audit FILE --base BASE --members DIR --non-members DIR",
        ],
    )


def describe(person: Person) -> str:
    """A person in words."""
    told = {
        name: value for name, value in person.attributes().items() if not name.startswith("hair")
    }
    hair = f"{word('hair_style', person.attributes()['hair_style'])} {phrase('hair_colour', person.attributes()['hair_colour'])}"
    return ", ".join([hair, *(phrase(name, told[name]) for name in IDENTITY if name in told)])


def _pictures(out: Path, person: Person, seed: int) -> tuple[Pictures, Manifest]:
    folder = out / "pictures"
    if not (folder / "metadata.jsonl").exists():
        world.save_folder(world.portraits(person, PICTURES, [seed, 8], name=TRIGGER), folder)
    pictures = load_pictures(folder)
    if not (out / SPLIT).exists():
        random_split(
            pictures, n_members=PICTURES // 2, n_non_members=PICTURES // 2, seed=seed
        ).save(out / SPLIT)
    return pictures, Manifest.load(out / SPLIT)


def _draw(denoiser: Denoiser, folder: Path | None, seed: int) -> np.ndarray:
    if folder is None:
        denoiser.detach()
    else:
        denoiser.attach(open_lora(folder / WEIGHTS).load())
    return sample(denoiser, [PROMPT] * DRAWN, seed=seed)


def _card(
    name: str, words: str, report: dict[str, Any], exposure: float, match: float, drawn: np.ndarray
) -> Card:
    return {
        "name": name,
        "subtitle": words,
        "report": report,
        "report_path": f"{name}/report.html",
        "numbers": [
            ("passes over each picture", f"{exposure:.0f}"),
            ("drawn pictures that show the person", f"{match:.0%}"),
        ],
        "images": [_group(f"What it draws for “{PROMPT}”", drawn)],
    }


def _group(title: str, pixels: np.ndarray) -> ImageGroup:
    uris = [thumbnail(p) for p in pixels]
    return {
        "title": title,
        "pictures": [{"src": uri, "alt": f"{title}, {i + 1}"} for i, uri in enumerate(uris)],
    }
