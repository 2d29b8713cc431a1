"""What `guard evaluate` is given, as folders: subjects by their folder, guards by their files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffward.data import Pictures
from diffward.errors import InputError
from diffward.guard.artefacts import read_edit, read_mask
from diffward.guard.domains import Domains, in_both, load_domain, load_folders
from diffward.guard.sides import Guarded, Side, random_matched
from diffward.models.eyes import agreement_of
from diffward.models.parameters import parameters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffward.guard.mask import FreezeMask
    from diffward.models.denoiser import Denoiser
    from diffward.models.eyes import Eye

ALONE = "subject"  # what the only subject is called where the pictures lie in no sub-folders


@dataclass
class Case:
    """The pictures of both domains.

    Attributes:
        illegal, held_out: what the attacker trains on, and other pictures of the same subjects, by subject.
        others: held-out pictures of people whom nobody forbids, by name: without them any picture would look
            most like the only subject there is.
        innocent, innocent_held_out: of the allowed domain.
        notes: what somebody who reads the result should know of them.
    """

    illegal: dict[str, Pictures]
    held_out: dict[str, Pictures]
    others: dict[str, Pictures]
    innocent: Pictures
    innocent_held_out: Pictures
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(
        cls, illegal: str, illegal_held_out: str, innocent: str, innocent_held_out: str, *, subjects: str = "",
        others: str = "", **columns: Any,
    ) -> Case:  # fmt: skip
        """List all folders; each may be several with commas between, and a sub-folder is a subject.

        Args:
            subjects: names of those attacked, with commas between; without any, all of `illegal`.

        Raises:
            InputError: a folder is missing or empty, a subject has no pictures in one of the two, or there is
                nobody to tell the subjects from.
        """
        training, found = (
            _by_subject(option, load_folders(option, given, True, columns))
            for option, given in (("illegal", illegal), ("illegal-held-out", illegal_held_out))
        )
        chosen = [name.strip() for name in subjects.split(",") if name.strip()] or list(training)
        for name in chosen:
            for option, there in (("illegal", training), ("illegal-held-out", found)):
                if name not in there:
                    raise InputError(
                        f"--{option}: no pictures of {name}; it has {', '.join(there)}"
                    )
        known = {name: own for name, own in found.items() if name not in chosen}
        more = _by_subject("others", load_folders("others", others, False, columns))
        if both := [name for name in more if name in found]:
            raise InputError(
                f"--others: {both[0]} is in --illegal-held-out too; rename one of the two folders"
            )
        if len(chosen) + len(known) + len(more) < 2:
            raise InputError(
                "--others is missing: give a folder with pictures of others, a sub-folder each; with only one person "
                "to choose from, every picture would be recognised as that one"
            )
        case = cls(
            {name: training[name] for name in chosen}, {name: found[name] for name in chosen}, {**known, **more},
            load_domain("innocent", innocent, True, columns),
            load_domain("innocent-held-out", innocent_held_out, True, columns),
        )  # fmt: skip
        case._check(more)
        return case

    def _check(self, others: dict[str, Pictures]) -> None:
        """The domains must not share pictures. Held-out ones that look nearly like training ones are noted: two
        pictures of one subject may."""
        illegal, held_out = _join(self.illegal), _join(self.held_out)
        forbidden = Pictures([*illegal, *held_out])
        Domains(forbidden, Pictures([*self.innocent, *self.innocent_held_out])).check(
            " (held-out pictures included)"
        )
        if same := set(forbidden.hashes) & set(_join(others).hashes):
            raise InputError(
                f"--others: {len(same)} pictures are in --illegal or --illegal-held-out too; take them out"
            )
        for option, training, held in (
            ("illegal", illegal, held_out), ("innocent", self.innocent, self.innocent_held_out),
        ):  # fmt: skip
            if near := in_both(held, training):
                self.notes.append(
                    f"{len(near)} of --{option}-held-out look nearly like pictures of --{option}: what they measure may "
                    "be memory of those"
                )

    def sides(
        self, denoiser: Denoiser, class_prompt: str = "", innocent_class_prompt: str = "", *, cache: bool = True,
        eye: Eye | None = None,
    ) -> tuple[Side, Side]:  # fmt: skip
        """Both domains, encoded; prompts are the held-out pictures' captions.

        Args:
            eye: tells how well captions are kept, where it can.
        """
        size = denoiser.resolution
        galleries = {n: own.pixels(size) for n, own in {**self.held_out, **self.others}.items()}
        prompts = {name: _captions(own, name) for name, own in self.held_out.items()}
        allowed = _captions(self.innocent_held_out, "the allowed domain")
        illegal = Side.of(
            denoiser, _join(self.illegal), _join(self.held_out), prompts, cache=cache, galleries=galleries,
            class_prompt=class_prompt, agreement=eye and agreement_of(eye, [c for own in prompts.values() for c in own]),
        )  # fmt: skip
        innocent = Side.of(
            denoiser, self.innocent, self.innocent_held_out, allowed, cache=cache, class_prompt=innocent_class_prompt,
            agreement=eye and agreement_of(eye, allowed),
        )  # fmt: skip
        return illegal, innocent


def guards_of(
    denoiser: Denoiser, mask: str | None, edits: str | None, seeds: Sequence[int]
) -> tuple[list[Guarded], FreezeMask | None]:
    """The rows that follow from a mask and edits: none, each edit, random, the mask, the mask on each edit.

    Args:
        mask: its file; of the base as it is, or of it with one of the edits.
        edits: files with commas between, each perhaps with `NAME=` before it.
        seeds: each gets a random mask of its own, of the same share of parameters.

    Raises:
        InputError: neither is given, or one is for another base.
    """
    changed = {}
    for given in (edits or "").split(","):
        name, equals, path = given.strip().rpartition("=")
        if not path:
            continue
        name = name if equals else _method(path)
        if name in changed:
            raise InputError(f"--edit: two are called {name}; name them: {name}={path}")
        changed[name] = read_edit(path, denoiser)
    guards = [Guarded("none"), *(Guarded(name, edit=edit) for name, edit in changed.items())]
    if mask is None:
        if not changed:
            raise InputError("--mask or --edit is missing: say what guards the base")
        return guards, None
    given_mask = read_mask(mask, denoiser)
    own = parameters_of(denoiser.unet)
    where = f"base {denoiser.name}"
    given_mask.check_names({name: tuple(p.shape) for name, p in own.items()}, where)
    plain = all(given_mask.is_base(name, p) for name, p in own.items())
    fitting = [
        name for name, edit in changed.items()
        if plain or all(given_mask.is_base(n, edit.get(n, p)) for n, p in own.items())
    ]  # fmt: skip
    if not plain and not fitting:
        raise InputError(
            f"{where}: has other values than the base that the mask was made for"
            + (", with each of the edits too" if changed else "")
        )
    name = str(given_mask.facts.get("method", "mask"))
    guards += [random_matched(denoiser, given_mask.frozen, seed) for seed in seeds]
    if plain:
        # A learned mask that is itself called like a row of comparison would take its place.
        label = name if name not in ("none", "random") else f"{name} mask"
        guards.append(Guarded(label, given_mask.frozen))
    guards += [Guarded(f"{name}+{one}", given_mask.frozen, changed[one]) for one in fitting]
    return guards, given_mask


def mask_words(mask: FreezeMask) -> dict[str, str]:
    """What a page says of a mask."""
    facts = mask.facts
    told = {"frozen": mask.told(), "found by": str(facts.get("method", "unknown"))}
    if budget := facts.get("budget"):
        told["budget"] = f"{float(budget['share']):.0%} by {budget['by']}"
    for which, words in (("illegal", "forbidden domain"), ("innocent", "allowed domain")):
        if domain := facts.get("domains", {}).get(which):
            told[words] = f"{domain['name']}, {domain['pictures']} pictures"
    return told


def _by_subject(option: str, folders: Sequence[tuple[str, Pictures]]) -> dict[str, Pictures]:
    """Pictures by the top folder that they lie in; of several folders, one without sub-folders is a subject itself.

    Raises:
        InputError: two folders have a subject of one name.
    """
    found: dict[str, Pictures] = {}
    for folder, pictures in folders:
        rows: dict[str, list[int]] = {}
        for row, picture in enumerate(pictures):
            top, slash, _ = picture.name.partition("/")
            alone = ALONE if len(folders) == 1 and option != "others" else folder
            rows.setdefault(top if slash else alone, []).append(row)
        for name, own in rows.items():
            if name in found:
                raise InputError(
                    f"--{option}: two folders have a subject {name}; rename one of them"
                )
            found[name] = pictures.at(own)
    return found


def _join(parts: dict[str, Pictures]) -> Pictures:
    return Pictures([picture for own in parts.values() for picture in own])


def _captions(pictures: Pictures, whose: str) -> list[str]:
    """Distinct captions, in their order."""
    found = [caption for caption in dict.fromkeys(pictures.captions) if caption]
    if not found:
        raise InputError(
            f"the held-out pictures of {whose} have no captions; prompts are taken from them: add captions, or give "
            "--default-caption"
        )
    return found


def _method(path: str) -> str:
    """The method that made an edit, as its run wrote beside it."""
    try:
        return str(
            json.loads(Path(path).with_name("run.json").read_text(encoding="utf-8"))["method"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "edit"
