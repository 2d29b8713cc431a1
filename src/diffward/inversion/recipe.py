"""How one LoRA of a zoo is trained, and the ranges from which that is drawn.

Strangers' LoRAs have unknown starts, ranks, rates and lengths: a network that has seen one recipe reads one recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffward.errors import InputError
from diffward.finetune.settings import Settings

OWN = "captions"  # a template that stands for the pictures' own captions
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


@dataclass
class Ranges:
    """What varies in a zoo. Of lists one is drawn for each LoRA; of two numbers with a colon, anything between, log-uniform."""

    steps: str = "10:100"
    """optimizer steps"""
    checkpoints: int = 3
    """saves of each LoRA, at log-spaced steps, the last one at its end"""
    rank: str = "1,2,4,8,16"
    """drawn for a shard at a time"""
    alpha: str = "0.5,1,2"
    """in units of the rank"""
    lr: str = "5e-4:3e-3"
    optimizer: str = "adamw,adamw,lion"
    """drawn for a shard at a time; lion takes a third of the rate"""
    init: str = "uniform,gaussian"
    schedule: str = "constant,cosine"
    weight_decay: str = "0,0.01,0.1"
    pictures: str = "1:16"
    """of each subject"""
    batch: int = 2
    targets: str = "attention"
    templates: str = "a portrait of {name}|a photo of {name}|a picture of {name} person|{name}|a photo of {name} looking front|captions"
    """with | between; {name} is a random word; `captions` stands for the pictures' own captions"""

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "alpha", "lr", "weight_decay", "pictures"):
            values = _numbers(name, getattr(self, name))
            least = (
                0
                if name in ("weight_decay",)
                else 1
                if name in ("steps", "rank", "pictures")
                else 1e-12
            )
            text = getattr(self, name)
            if ":" in text:
                least = max(least, 1e-12)  # log-uniform
            if min(values) < least:
                raise InputError(f"--{name.replace('_', '-')} {text}: must be at least {least:g}")
        for name in ("optimizer", "init", "schedule"):
            for value in getattr(self, name).split(","):
                Settings(**{name: value})  # says what there is
        Settings(batch=self.batch)
        if self.checkpoints < 1:
            raise InputError(f"--checkpoints {self.checkpoints}: must be at least 1")
        for template in self.templates.split("|"):
            if template != OWN and "{name}" not in template:
                raise InputError(f"--templates: {template!r} has no {{name}}")


@dataclass(frozen=True)
class Recipe:
    """One LoRA's training."""

    steps: int
    rank: int
    alpha: float
    lr: float
    optimizer: str
    init: str
    schedule: str
    weight_decay: float
    pictures: int
    template: str
    word: str
    seed: int

    def settings(self, ranges: Ranges) -> Settings:
        return Settings(
            steps=self.steps, batch=ranges.batch, lr=self.lr, weight_decay=self.weight_decay, schedule=self.schedule,
            optimizer=self.optimizer, init=self.init, rank=self.rank, alpha=self.alpha, targets=ranges.targets,
            seed=self.seed, checkpoint_every=20,
        )  # fmt: skip

    def caption(self, own: str) -> str:
        """What a picture is called in training; `own` is its own caption."""
        text = own if self.template == OWN and own else self.template
        if text == OWN:
            text = "{name}"
        return text.replace("{name}", self.word)


def draw_recipes(ranges: Ranges, seed: int, shard: int, count: int) -> list[Recipe]:
    """The recipes of a shard: rank and optimizer are its own, the rest is drawn for each LoRA."""
    rng = np.random.default_rng([seed, 41, shard])
    rank = round(_draw(rng, "rank", ranges.rank))
    optimizer = str(rng.choice(ranges.optimizer.split(",")))
    return [_draw_recipe(rng, ranges, rank, optimizer) for _ in range(count)]


def _draw_recipe(rng: np.random.Generator, ranges: Ranges, rank: int, optimizer: str) -> Recipe:
    def number(name: str) -> float:
        return _draw(rng, name, getattr(ranges, name))

    def word(name: str) -> str:
        return str(rng.choice(getattr(ranges, name).split(",")))

    return Recipe(
        steps=round(number("steps")), rank=rank, alpha=rank * number("alpha"),
        lr=number("lr") / (3 if optimizer == "lion" else 1), optimizer=optimizer, init=word("init"),
        schedule=word("schedule"), weight_decay=number("weight_decay"), pictures=round(number("pictures")),
        template=str(rng.choice(ranges.templates.split("|"))),
        word="".join(rng.choice(_LETTERS, size=int(rng.integers(4, 12)))), seed=int(rng.integers(1 << 30)),
    )  # fmt: skip


def saved_at(steps: int, checkpoints: int) -> list[int]:
    """The log-spaced steps after which a LoRA is saved, each half of the next: 12, 25, 50 of 50."""
    return sorted({max(1, round(steps / 2**i)) for i in range(checkpoints)})


def _draw(rng: np.random.Generator, name: str, text: str) -> float:
    values = _numbers(name, text)
    if ":" in text:
        return math.exp(rng.uniform(math.log(values[0]), math.log(values[1])))
    return float(rng.choice(values))


def _numbers(name: str, text: str) -> list[float]:
    try:
        values = [float(v) for v in text.replace(":", ",").split(",")]
    except ValueError:
        values = []
    if (
        not all(map(math.isfinite, values))
        or not values
        or (":" in text and (len(values) != 2 or values[0] > values[1]))
    ):
        raise InputError(
            f"--{name.replace('_', '-')} {text}: give numbers with commas between, or the least and the largest with a colon"
        )
    return values
