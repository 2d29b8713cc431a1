"""Pictures drawn from weights, with their controls; and LoRAs that hold nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.inversion_readers import row

if TYPE_CHECKING:
    from bench.weight_inversion import Rows, Setting
    from diffward.inversion.data import Data

VICTIMS, PICTURES = 30, 3
CLASS_PROMPT = "a portrait of a person"


def decoders(setting: Setting) -> Rows:
    """Every decoder on 30 victims with a long training, three pictures each, under every control; and a grid of them."""
    victims = longest(setting, 2 if setting.quick else VICTIMS)
    pictures = {name: draw(setting, victims, *name) for name in WAYS}
    save_grid(setting, victims, pictures)
    return [judged(setting, victims, name, pixels) for name, pixels in pictures.items()]


def read_words(setting: Setting) -> Rows:
    """The same with the caption that was decoded from the weights, word by word, in the place of z."""
    victims = longest(setting, 2 if setting.quick else VICTIMS)
    return [
        judged(setting, victims, (name, READ), draw(setting, victims, name, READ))
        for name in ("victim", "guided")
    ]


READ = "read prompt"
# (decoder, control)
WAYS = [
    ("base", "own"), ("base", "shuffled"), ("base", "other"), ("latent", "own"), ("latent", "shuffled"), ("latent", "other"),
    ("victim", "own"), ("victim", "shuffled"), ("victim", "other"), ("guided", "own"), ("guided", "other"),
    ("victim", "class prompt"), ("victim", "null prompt"), ("victim", "true prompt"), ("base", "class prompt"),
    ("guided", "class prompt"),
]  # fmt: skip


def longest(setting: Setting, count: int) -> Data:
    data = setting.material.test.last()
    order = sorted(range(len(data)), key=lambda i: -data.rows[i].step)[:count]
    return data.of(order)


def draw(setting: Setting, victims: Data, decoder: str, control: str) -> np.ndarray:
    """(victims x pictures, H, W, 3)."""
    from diffward.inversion.decoders import DECODERS, conditioned, extrapolated

    denoiser, inverter = setting.denoiser, setting.inverter
    z = inverter.read(victims.tokens).mu
    if control == "shuffled":
        z = inverter.read(victims.tokens.shuffled()).mu
    elif control == "other":
        z = z.roll(1, 0)
    made = []
    for i, row_ in enumerate(victims.rows):
        seeds = [1000 * i + j for j in range(PICTURES)]
        if decoder in ("victim", "guided"):
            denoiser.attach(setting.material.zoo.lora(row_))
        else:
            denoiser.detach()
        if control.endswith("prompt"):
            caption = {"class prompt": CLASS_PROMPT, "null prompt": ""}.get(control)
            if control == READ:
                caption = _decoded(setting, row_)
            if caption is None:
                template = row_.recipe["template"]
                caption = ("a portrait of {name}" if template == "captions" else template).replace(
                    "{name}", row_.recipe["word"]
                )
            conditioning = denoiser.condition([caption]).expand(PICTURES, -1, -1)
            with torch.no_grad():
                made.append(
                    extrapolated(denoiser, conditioning, seeds)
                    if decoder == "guided"
                    else conditioned(denoiser, conditioning, denoiser.condition([""]), seeds)
                )
        else:
            made.append(
                DECODERS[decoder].obj(inverter, denoiser, z[i : i + 1].expand(PICTURES, -1), seeds)
            )
    denoiser.detach()
    return np.concatenate(made)


def _decoded(setting: Setting, row_: Any) -> str:
    from diffward.inversion.prompt import Words, decode, evidence, metric

    found = evidence(setting.material.zoo.lora(row_))
    return decode(found, Words(setting.denoiser), 4, metric=metric(setting.inverter.moment))[0].text


def judged(
    setting: Setting, victims: Data, way: tuple[str, str], pixels: np.ndarray
) -> dict[str, Any]:
    """Attributes and identity of the pictures; the mean of a victim's pictures is looked for among strangers."""
    from diffward.models.mini.attributes import Person
    from diffward.models.mini.reader import load_reader

    reader, inverter, eye = load_reader(), setting.inverter, setting.material.eye
    groups = pixels.reshape(len(victims), PICTURES, *pixels.shape[1:])
    vectors, hits, matches = [], [], []
    for own, row_ in zip(groups, victims.rows, strict=True):
        vectors.append(inverter.space.of(eye.features(own)))
        seen = reader.read(own)
        person = Person(row_.label)
        hits += [float((seen[name] == value).mean()) for name, value in person.attributes().items()]
        matches.append(float(reader.matches(own, person).mean()))
    found = inverter.standard_identity(torch.stack(vectors))
    return row(
        "encoder" if not way[1].endswith("prompt") else "no reader", found, victims, inverter, decoder=way[0], control=way[1],
        accuracy=float(np.mean(hits)), identity_match=float(np.mean(matches)),
    )  # fmt: skip


def save_grid(setting: Setting, victims: Data, pictures: dict[tuple[str, str], np.ndarray]) -> None:
    """A picture to judge by: a column a victim, a row a way; the first row are the person's own pictures."""
    from pathlib import Path

    from PIL import Image

    from diffward.inversion.data import OTHER_PICTURES

    count = min(12, len(victims))
    rows = [
        [
            setting.material.subjects.pictures(victims.rows[i].identity, 1, OTHER_PICTURES)[
                0
            ].pixels
            for i in range(count)
        ]
    ]
    for way in (
        ("latent", "own"),
        ("base", "own"),
        ("victim", "own"),
        ("guided", "own"),
        ("base", "shuffled"),
        ("victim", "class prompt"),
    ):
        rows.append([pictures[way][i * PICTURES] for i in range(count)])
    grid = np.concatenate([np.concatenate(one, 1) for one in rows], 0)
    file = setting.folder / "grid.png" if setting.quick else Path("docs/weights-grid.png")
    Image.fromarray(grid).resize((grid.shape[1], grid.shape[0])).save(file)
