"""What `private-lora` compares: the trainings, the order they run in, and the pictures they learn from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffward.data import Manifest, Pictures, load_pictures, near_duplicate_groups, random_split
from diffward.files import atomic_folder
from diffward.finetune.auxiliary import mark_auxiliary
from diffward.finetune.settings import DP, Privacy, Settings
from diffward.models.mini import world
from diffward.models.mini.attributes import SCENE, Person, phrase
from diffward.report.sides import Sides, sides_of_split

PEOPLE, CLOTHING = "mini people", "clothing"
POOL = 4100  # seed of the people; what was tried out beforehand has another
SEEDS = (0, 1, 2)
SNAPSHOTS = (5.0, 20.0, 40.0)


@dataclass(frozen=True)
class Recipe:
    """One way of training: a method, and what differs from the common settings.

    Attributes:
        label: how a table tells it from the method's own settings.
        options: of `Settings`.
        at: passes over each picture after which the weights are taken; the last one ends the run. Only
            a method that changes nothing with the length of the run may have several.
        rank: of the LoRA; 0: there is none.
        prior: whether class pictures are added (DreamBooth).
    """

    method: str
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    at: tuple[float, ...] = (40.0,)
    rank: int = 8
    prior: bool = False

    def settings(self, seed: int) -> Settings:
        common: dict[str, Any] = {"batch": 8, "lr": 1e-3, "schedule": "constant", "targets": "all"}
        if self.rank:
            common |= {"rank": self.rank, "alpha": self.rank}
        return Settings(epochs=self.at[-1], seed=seed, **common | self.options)


@dataclass(frozen=True)
class Case:
    """The weights of a recipe after some passes, for one seed: what is audited."""

    dataset: str
    recipe: Recipe
    seed: int
    passes: float

    @property
    def method(self) -> str:
        return self.recipe.method

    @property
    def told(self) -> str:
        """The settings, as a table has them."""
        rank = f"rank {self.recipe.rank}" if self.recipe.rank else ""
        return ", ".join(filter(None, [rank, self.recipe.label]))

    @property
    def settings(self) -> Settings:
        return self.recipe.settings(self.seed)

    @property
    def training(self) -> str:
        """Name of the run that this is a snapshot of."""
        parts = [self.dataset, self.method, self.told, f"x{self.recipe.at[-1]:g}", f"s{self.seed}"]
        return "-".join(parts).replace(" ", "-").replace(",", "")

    @property
    def name(self) -> str:
        return f"{self.training}-at{self.passes:g}"

    @property
    def siblings(self) -> list[Case]:
        """All cases of the same run, by passes."""
        return [Case(self.dataset, self.recipe, self.seed, passes) for passes in self.recipe.at]


@dataclass(frozen=True)
class Share:
    """A part of the table, complete in itself."""

    dataset: str
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...] = (0,)

    def cases(self) -> Iterator[Case]:
        """Seed by seed, so that what is there when a bench is stopped can be compared."""
        for seed in self.seeds:
            for recipe in self.recipes:
                for passes in recipe.at:
                    yield Case(self.dataset, recipe, seed, passes)


def _weights(method: str, weights: tuple[float, ...]) -> Iterator[Recipe]:
    for weight in weights:
        yield Recipe(method, f"weight {weight:g}", {"privacy": Privacy(weight=weight)})


PAPER: dict[str, Any] = {"privacy": Privacy(paper=True)}
# Keys and values of the cross-attention alone: the caption's words learn, the drawing does not.
TEXT: dict[str, Any] = {"targets": "text", "lr": 2e-3}
# The words alone learn, from teachers that drew on everything; settings set beforehand.
TAUGHT: dict[str, Any] = {
    **TEXT, "schedule": "cosine", "privacy": Privacy(teacher_targets="all", teacher_lr=1e-3),
}  # fmt: skip
FULL: dict[str, Any] = {"tune": "full", "lr": 1e-4}

# Luo et al. 2025, Table 1 and Table 2, and what is to improve on it.
MAIN = (
    Recipe("plain", at=SNAPSHOTS),
    Recipe("plain", "text", TEXT, at=(12.0, 24.0)),
    Recipe("smp"),
    Recipe("plain", "text", TEXT, at=(40.0,)),
)
DEFENCES = (
    Recipe("hinge"),
    Recipe("dp", "epsilon 8", {"dp": DP(epsilon=8.0)}),
    Recipe("mp"),
    Recipe("distill", "text", TEXT, at=(20.0,)),
    Recipe("moment"),
    Recipe("dual"),
    Recipe("earlystop"),
    Recipe("distill"),
)
VARIANTS = (
    Recipe("distill", "text, teachers on all layers", TAUGHT, at=(60.0,)),
    Recipe("hinge", "text", TEXT, at=(24.0,)),
    Recipe("hinge", "weight 0.3", {"privacy": Privacy(weight=0.3)}),
    Recipe("dp", "text, epsilon 8", {**TEXT, "dp": DP(epsilon=8.0)}),
    Recipe("smp", "as in the paper", PAPER),
    Recipe("mp", "as in the paper", PAPER),
)
# Real photographs.
PHOTOGRAPHS = (
    Recipe("plain", at=(20.0, 100.0), rank=64),
    Recipe("plain", "text", TEXT, at=(100.0,), rank=64),
    Recipe("smp", at=(100.0,), rank=64),
)
# Table 6, for the sum too: at the effective weights that the ratio was seen to have.
SWEEP = (*_weights("smp", (1.0, 0.01)), *_weights("mp", (0.03, 0.005, 0.0005)))
# Tables 8 (rank), 9 (DreamBooth, full fine-tuning) and the paper's exposure.
EXTRA = (
    *(Recipe(method, rank=64) for method in ("plain", "smp")),
    *(Recipe(method, "full", FULL, rank=0) for method in ("plain", "smp", "hinge")),
    *(Recipe(method, "class pictures", prior=True) for method in ("plain", "smp")),
    *(Recipe(method, "the paper's exposure", at=(400.0,)) for method in ("plain", "smp")),
)

SHARES = (
    Share(PEOPLE, MAIN, SEEDS),
    Share(PEOPLE, DEFENCES, SEEDS),
    Share(CLOTHING, PHOTOGRAPHS),
    Share(PEOPLE, VARIANTS),
    Share(PEOPLE, SWEEP),
    Share(PEOPLE, EXTRA),
)
QUICK = (Share(PEOPLE, (
    Recipe("plain", at=(1.0, 2.0)),
    Recipe("smp", at=(2.0,)),
    Recipe("distill", at=(2.0,)),
)),)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How many people, and how many pictures of each on which side."""

    people: int = 10
    members: int = 16
    auxiliary_members: int = 4  # of the members
    judged_non_members: int = 12
    auxiliary_non_members: int = 8

    @property
    def portraits(self) -> int:
        return self.members + self.judged_non_members + self.auxiliary_non_members


QUICK_SIZES = Sizes(2, 8, 4, 4, 4)

# Of the photographs: members, non-members, and the share of either that is auxiliary.
PHOTOGRAPH_SIDE, PHOTOGRAPH_AUXILIARY = 200, 0.25


@dataclass
class Material:
    """Pictures, who is on which side, and whom they show (nobody, where they are photographs)."""

    pictures: Pictures
    manifest: Manifest
    people: dict[str, Person] = field(default_factory=dict)

    @cached_property
    def sides(self) -> Sides:
        """Members and non-members that nobody compared: what is judged."""
        return sides_of_split(self.pictures, self.manifest)

    @cached_property
    def training(self) -> Pictures:
        return self.pictures.with_hashes(self.manifest.members)

    @cached_property
    def groups(self) -> list[int]:
        """Near-duplicates among the training pictures share a number."""
        numbers = [0] * len(self.training)
        for number, group in enumerate(near_duplicate_groups(self.training, poses=False)):
            for row in group:
                numbers[row] = number
        return numbers

    def shown(self, caption: str) -> Person | None:
        """Whom a caption names."""
        words = set(caption.replace(",", " ").split())
        return next((person for name, person in self.people.items() if name in words), None)


def people_material(folder: Path, seed: int, sizes: Sizes) -> Material:
    """Portraits of new fictional people, no two alike; drawn into `folder` if they are not there.

    A random part trains, another is judged, the rest is auxiliary.
    """
    rng = np.random.default_rng([POOL, seed, 1])
    people: dict[str, Person] = {}
    while len(people) < sizes.people:
        name, person = world.random_name(rng), Person.random(rng)
        if name not in people and all(person.differs(other) >= 3 for other in people.values()):
            people[name] = person
    if not folder.exists():
        _draw(folder, people, seed, sizes.portraits)
    pictures = load_pictures(folder)
    # As many of each person on either side would bias every cross-fitted attack: a fold with one member
    # more is judged by what learned from one member less. So the draw is free.
    hashes = [pictures[int(i)].sha256 for i in rng.permutation(len(pictures))]
    members, others = np.split(np.array(hashes), [sizes.people * sizes.members])
    auxiliary = [
        *members[: sizes.people * sizes.auxiliary_members],
        *others[: sizes.people * sizes.auxiliary_non_members],
    ]
    manifest = Manifest(
        sorted(members.tolist()), sorted(others.tolist()), seed=seed, source=pictures.layout,
        auxiliary=sorted(map(str, auxiliary)),
    )  # fmt: skip
    manifest.check(pictures)
    return Material(pictures, manifest, people)


def _draw(folder: Path, people: dict[str, Person], seed: int, count: int) -> None:
    """`count` portraits of each; a quarter more are drawn, and of near-duplicates one is kept."""
    each = count + max(8, count // 4)
    drawn = [
        drawing
        for number, (name, person) in enumerate(people.items())
        for drawing in world.portraits(
            person, each, [POOL, seed, 2, number], name=name, mention=0.3
        )
    ]
    with tempfile.TemporaryDirectory() as all_of_them:
        world.save_folder(drawn, Path(all_of_them))
        first = _unlike(load_pictures(all_of_them))
    kept = []
    for number in range(len(people)):
        unlike = [i for i in range(number * each, (number + 1) * each) if i in first]
        assert len(unlike) >= count, f"person {number}: {len(unlike)} portraits that differ"
        kept += [drawn[i] for i in unlike[:count]]
    with atomic_folder(folder) as temporary:
        world.save_folder(kept, temporary)


def _unlike(pictures: Pictures) -> set[int]:
    """Which to keep so that no two are near-duplicates."""
    kept = set(range(len(pictures)))
    # Whether two are alike may depend on which comes first.
    for order in (list(kept), list(reversed(range(len(pictures))))):
        for group in near_duplicate_groups([pictures[i] for i in order]):
            alike = sorted(order[place] for place in group)
            kept -= set(alike[1:])
    return kept


def data_root() -> Path:
    """Where the test data lies, if it does."""
    return Path(os.environ.get("DIFFWARD_DATA", "../shared/data"))


def clothing_material(seed: int) -> Material:
    """Photographs of clothes, split at random."""
    side = PHOTOGRAPH_SIDE
    pictures = load_pictures(data_root() / "clothing", limit=2 * side + side // 2)
    manifest = random_split(pictures, n_members=side, n_non_members=side, seed=seed)
    return Material(pictures, mark_auxiliary(pictures, manifest, PHOTOGRAPH_AUXILIARY, seed))


def named_attributes(caption: str) -> dict[str, int]:
    """The attributes of the scene that a caption of `world.portraits` tells, by value."""
    parts = set(caption.split(", "))
    return {
        name: index
        for name, values in SCENE.items()
        for index in range(len(values))
        if phrase(name, index) in parts
    }
