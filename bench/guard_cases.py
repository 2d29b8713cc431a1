"""What the guard's tables compare: the domains, the guards, and the masks that are learned once and shared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench._claim import claimed
from diffward.data import Pictures, load_pictures
from diffward.files import atomic_folder
from diffward.guard import GUARDS, FreezeMask, GuardSettings, Subject
from diffward.guard.budget import choose
from diffward.guard.learn import learn_mask
from diffward.guard.settings import ImmaOptions
from diffward.guard.sides import Guarded, Side, random_matched
from diffward.guard.subject import Found
from diffward.models.mini import world
from diffward.models.mini.attributes import DOMAINS, Person

if TYPE_CHECKING:
    from diffward.models.denoiser import Denoiser

WORK = Path("runs/bench-freezeasguard")
POOL = 5200  # seed of the people and things; what was tried out beforehand has another
RHO = 0.3
INTERVAL = GuardSettings.interval
ATTACKED = 2  # subjects that an attacker adapts to, each alone
PUBLISHER, ATTACKER, HELD_OUT = 12, 16, 24  # portraits of each person
THINGS = 64  # pictures of the innocent domain for either of the three
# name: (domain, style), styles that the base has never seen.
INNOCENT = {"neon garments": ("garment", "neon"), "sketched logos": ("logo", "sketch")}
# Beside the domain, what the attribute network, which knows neither style, still reads: in drawings of its own, 0.97,
# 0.91 and 0.85 right; colours are lost.
READABLE = {"garment": ("garment", "pattern"), "logo": ("shape",)}
OTHER_ILLEGAL = ("logo", "mosaic")
# `freeze` with the illegal loss weighed more than the innocent one.
HARD_WEIGHT = 2.0
HARD = f"freeze (weight {HARD_WEIGHT:g})"
# `immunise` against the attacker's own full fine-tuning; its ascent at a rate that leaves the base in use.
IMMA = ImmaOptions(variant="full", steps=300, batch=8, inner_lr=1e-3, outer_lr=1e-4)


@dataclass(frozen=True)
class Sizes:
    """How much is done: pictures, steps, drawn pictures."""

    portraits: tuple[int, int, int] = (PUBLISHER, ATTACKER, HELD_OUT)
    things: int = THINGS
    tune: int = 300
    updates: int = 60
    attack: int = 100
    drawn: int = 24
    drawn_things: int = 48
    draw_steps: int = 20
    imma: ImmaOptions = field(default_factory=lambda: IMMA)


QUICK = Sizes(
    portraits=(4, 4, 4), things=8, tune=80, updates=3, attack=3, drawn=3, drawn_things=4, draw_steps=2,
    imma=ImmaOptions(variant="full", steps=2, batch=2, inner_lr=1e-3, outer_lr=1e-4),
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """Pictures of one seed: some people, whom nobody may adapt to, and a style that anybody may."""

    seed: int
    subjects: int
    innocent: str
    sizes: Sizes
    work: Path

    @cached_property
    def people(self) -> dict[str, Person]:
        """The first ones are the same however many there are."""
        rng = np.random.default_rng([POOL, self.seed, 1])
        people: dict[str, Person] = {}
        while len(people) < self.subjects:
            name, person = world.random_name(rng), Person.random(rng)
            if name not in people and all(person.differs(o) >= 3 for o in people.values()):
                people[name] = person
        return people

    def portraits(self, part: int, who: int | None = None) -> Pictures:
        """Of all the people, or of one: the publisher's (0), the attacker's (1), held-out ones (2)."""
        count = self.sizes.portraits[part]

        def draw() -> list[world.Drawing]:
            people = list(enumerate(self.people.items()))
            return [
                drawing
                for number, (name, person) in (people if who is None else [people[who]])
                for drawing in world.portraits(
                    person, count, [POOL, self.seed, 2 + part, number], name=name, mention=0.3
                )
            ]

        whom = f"{self.subjects}" if who is None else f"number{who}"
        more = f"-{count}" if count > HELD_OUT else ""
        return self._folder(f"portraits-{whom}-{part}-s{self.seed}{more}", draw)

    def things(self, part: int, kind: tuple[str, str] | None = None) -> Pictures:
        """Of the innocent domain, or of another kind."""
        domain, style = kind or INNOCENT[self.innocent]

        def draw() -> list[world.Drawing]:
            return [
                world.sample([POOL, self.seed, 10 + part, i], domain=domain, style=style)
                for i in range(self.sizes.things)
            ]

        return self._folder(f"{style}-{domain}-{part}-s{self.seed}", draw)

    def _folder(self, name: str, draw: Any) -> Pictures:
        folder = self.work / "pictures" / name
        with claimed(folder, wait=True):
            if not folder.exists():
                with atomic_folder(folder) as temporary:
                    world.save_folder(draw(), temporary)
        return load_pictures(folder)

    # --- what the evaluation wants -----------------------------------------------------------------

    def illegal_side(self, denoiser: Denoiser, who: int) -> Side:
        from diffward.models.mini.reader import load_reader

        name, person = list(self.people.items())[who]
        reader = load_reader()
        return Side.of(
            denoiser, self.portraits(1, who), self.portraits(2, who), {name: f"a portrait of {name}"},
            match=lambda pixels, subject: reader.matches(pixels, person), class_prompt="a portrait of a person",
        )  # fmt: skip

    def innocent_side(self, denoiser: Denoiser) -> Side:
        held = self.things(2)
        kind = INNOCENT[self.innocent][0]
        return Side.of(
            denoiser, self.things(1), held, held.captions[: self.sizes.drawn_things],
            class_prompt=f"a picture of a {kind}", agreement=self.captions_kept,
        )  # fmt: skip

    def captions_kept(self, pixels: np.ndarray, captions: list[str]) -> np.ndarray:
        """Of each picture (n,): which part of what its caption says, and can be read in the style, it shows."""
        from diffward.models.mini.reader import attribute_agreement, load_reader

        kind = INNOCENT[self.innocent][0]
        return attribute_agreement(load_reader(), pixels, [said_of(kind, one) for one in captions])


@dataclass
class Learned:
    """Guards that are found once and kept: scores, and edited weights."""

    base: str
    denoiser: Denoiser
    work: Path
    sizes: Sizes

    def settings(self, seed: int) -> GuardSettings:
        return GuardSettings(
            budget=RHO, by="parameters", tune_steps=self.sizes.tune, updates=self.sizes.updates, user_lr=1e-3,
            seed=seed, imma=self.sizes.imma,
        )  # fmt: skip

    def subject(
        self,
        place: World,
        folder: Path,
        seed: int | None = None,
        kind: tuple[str, str] | None = None,
    ) -> Subject:
        """The publisher's view: another illegal domain with `kind`, another run on the same pictures with `seed`."""
        from diffward.models.features import encode_pictures

        illegal = place.things(0, kind) if kind else place.portraits(0)
        return Subject(
            self.denoiser, encode_pictures(self.denoiser, illegal), encode_pictures(self.denoiser, place.things(0)),
            self.settings(place.seed if seed is None else seed), folder,
            concepts=list(place.people), guide="a person",
        )  # fmt: skip

    def mask(
        self, place: World, method: str = "freeze", *, seed: int | None = None,
        kind: tuple[str, str] | None = None, edit: bool = False, paper: bool = False,
        weight: float = 1.0, interval: int = INTERVAL,
    ) -> FreezeMask:  # fmt: skip
        """Learned and kept; with `edit`, of the base after `uce`; with `paper`, by the published update.

        Args:
            weight: lambda of the illegal domain, that of the innocent one being 1.
            interval: steps of the user between two updates of the mask; the user makes as many with any.
        """
        told = [method, self.base, f"{place.subjects}", place.innocent, f"s{place.seed}"]
        told += [f"again{seed}"] if seed is not None else []
        told += ["-".join(kind)] if kind else []
        told += ["after-uce"] if edit else []
        told += ["as-published"] if paper else []
        told += [f"weight{weight:g}"] if weight != 1 else []
        told += [f"every{interval}"] if interval != INTERVAL else []
        folder = self.work / "learned" / "-".join(told).replace(" ", "-")
        file = folder / "mask.json"
        with claimed(folder, wait=True):
            if not file.exists():
                print(f"learn {folder.name}")
                with self.edited(self.uce(place) if edit else {}):
                    subject = self.subject(place, folder, seed, kind)
                    subject.settings = replace(
                        subject.settings, illegal_weight=weight, interval=interval,
                        updates=max(1, self.sizes.updates * INTERVAL // interval),
                    )  # fmt: skip
                    if paper:
                        assert len(
                            subject.tuned
                        )  # as ever; only the user within the loop is the published one
                        subject.settings = replace(
                            subject.settings, paper=True, by="tensors", user_lr=1e-5
                        )
                    learn_mask(subject, method).save(file)
                for left in ("base.safetensors", "tuned.safetensors", "learning.pt"):
                    (folder / left).unlink(missing_ok=True)
        return FreezeMask.load(file)

    def budgeted(self, mask: FreezeMask, share: float) -> list[str]:
        """Names that the mask's scores freeze at another budget of parameters."""
        sizes = [float(entry.numel) for entry in mask.tensors.values()]
        chosen = choose(mask.scores.double(), sizes, share).tolist()
        return [name for name, one in zip(mask.tensors, chosen, strict=True) if one]

    def uce(self, place: World) -> dict[str, Any]:
        return self._edit(place, "uce")

    def imma(self, place: World) -> dict[str, Any]:
        return self._edit(place, "imma")

    def _edit(self, place: World, method: str) -> dict[str, Any]:
        from diffward.guard.stored import Stored

        name = f"{method}-{self.base}-{place.subjects}-s{place.seed}"
        folder = self.work / "learned" / name
        file = folder / "edit.safetensors"
        with claimed(folder, wait=True):
            if not file.exists():
                found: Found = GUARDS[method].obj(self.subject(place, folder))
                Stored.write(file, found.edited or {})
                (folder / "base.safetensors").unlink(missing_ok=True)
                (folder / "imma.pt").unlink(missing_ok=True)
        return dict(Stored(file))

    def edited(self, edit: dict[str, Any]) -> Any:
        """Within the block the base has these weights."""
        import contextlib

        from diffward.models.parameters import parameters_of, put

        @contextlib.contextmanager
        def block() -> Any:
            own = parameters_of(self.denoiser.unet)
            before = {name: own[name].detach().clone() for name in edit}
            put(self.denoiser.unet, edit)
            vars(self.denoiser).pop("unet_identity", None)
            try:
                yield
            finally:
                put(self.denoiser.unet, before)
                vars(self.denoiser).pop("unet_identity", None)

        return block()

    def guards(self, place: World, names: tuple[str, ...], share: float = RHO) -> list[Guarded]:
        """Ready to be attacked; `random` holds as many parameters as `freeze` does."""
        found, seed = [], place.seed
        for name in names:
            if name == "random":
                frozen = self.budgeted(self.mask(place), share)
                found.append(random_matched(self.denoiser, frozen, seed))
            elif name in ("uce", "imma"):
                found.append(Guarded(name, edit=getattr(self, name)(place), seed=seed))
            elif name == HARD:
                frozen = self.budgeted(self.mask(place, weight=HARD_WEIGHT), share)
                found.append(Guarded(name, frozen, seed=seed))
            elif name == "freeze+uce":
                frozen = self.budgeted(self.mask(place, edit=True), share)
                found.append(Guarded(name, frozen, self.uce(place), seed))
            else:
                found.append(Guarded(name, self.budgeted(self.mask(place, name), share), seed=seed))
        return found


def said_of(kind: str, caption: str) -> dict[str, int]:
    """The domain, and the readable attributes that a caption of `world.sample` names, by value."""
    words = set(caption.replace(",", " ").split())
    return {"domain": list(DOMAINS).index(kind)} | {
        name: index
        for name in READABLE[kind]
        for index, value in enumerate(DOMAINS[kind][name])
        if value in words
    }


@lru_cache(maxsize=8)
def load(base: str) -> Denoiser:
    from bench.make_bases import built
    from diffward.models.load import load_base

    return load_base(base if base == "mini" else str(built(base)), device="cpu")  # type: ignore[no-any-return]
