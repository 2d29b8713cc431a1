"""What is evaluated: guards ready to be attacked, and the two domains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from diffward.errors import InputError
from diffward.finetune.sampler import generator
from diffward.guard.attackers import ATTACKERS
from diffward.guard.budget import choose, share_of
from diffward.guard.compare import NONE, RANDOM
from diffward.models.parameters import parameters_of

if TYPE_CHECKING:
    from diffward.data import Pictures
    from diffward.guard.evaluate import EvaluateSettings
    from diffward.models.denoiser import Denoiser
    from diffward.models.features import Features

_LOT = 103  # stream of random numbers


@dataclass
class Guarded:
    """A guard, ready to be attacked: names that its mask freezes, weights that it edits, or both.

    Attributes:
        name: of the row; "none" and "random" are what the others are compared with.
        seed: the run that it is for, where every seed has a guard of its own; None: for all.
        facts: what the page may say of it.
    """

    name: str
    frozen: list[str] = field(default_factory=list)
    edit: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Side:
    """One domain.

    Attributes:
        training: what an attacker trains on.
        held_out: other pictures of the domain, for the loss.
        prompts: {subject: its prompt or prompts}, or prompts alone where nobody is to be recognised.
        real: pixels uint8 (m, H, W, 3) of held-out pictures, for KID and FID.
        match: (pixels, subject) to bool (n,), whether each picture shows the subject.
        galleries: {subject: real pixels}, subjects and others, from which the eye recognises where there
            is no `match`; see `eyes.gallery_match`. The page shows a picture of each subject.
        agreement: (pixels, their prompts) to (n,) in [0, 1], how well each keeps to its caption.
        class_prompt: what dreambooth's class pictures are drawn with.
    """

    training: Features
    held_out: Features
    prompts: Mapping[str, str | Sequence[str]] | Sequence[str]
    real: np.ndarray
    match: Callable[[np.ndarray, str], np.ndarray] | None = None
    galleries: Mapping[str, np.ndarray] | None = None
    agreement: Callable[[np.ndarray, list[str]], np.ndarray] | None = None
    class_prompt: str = ""

    @classmethod
    def of(
        cls, denoiser: Denoiser, training: Pictures, held_out: Pictures,
        prompts: Mapping[str, str | Sequence[str]] | Sequence[str], *, cache: bool = True, **more: Any,
    ) -> Side:  # fmt: skip
        """From pictures on disk: both encoded, and the held-out ones' pixels."""
        from diffward.models.features import encode_pictures

        return cls(
            encode_pictures(denoiser, training, cache=cache), encode_pictures(denoiser, held_out, cache=cache),
            prompts, held_out.pixels(denoiser.resolution), **more,
        )  # fmt: skip


def random_matched(denoiser: Denoiser, frozen: Sequence[str], seed: int) -> Guarded:
    """The guard "random" of one seed: tensors drawn by lot that hold as many parameters as `frozen`.

    Down a random ranking, each tensor that still fits: at most that share, and no tensor could be added.

    Raises:
        InputError: `frozen` is not of this base, or is nothing or everything.
    """
    own = parameters_of(denoiser.unet)
    _check_names(denoiser, frozen, RANDOM)
    sizes = torch.tensor([p.numel() for p in own.values()], dtype=torch.float64)
    share = share_of(torch.tensor([name in set(frozen) for name in own]), sizes)
    scores = torch.rand(len(own), generator=generator(seed, 0, _LOT), dtype=torch.float64)
    chosen = choose(scores, sizes, share)
    return Guarded(
        RANDOM, [n for n, one in zip(own, chosen.tolist(), strict=True) if one], seed=seed
    )


def prompts_of(side: Side, settings: EvaluateSettings) -> list[tuple[str, str]]:
    """(subject, prompt) of every picture to draw, subject by subject; "" where a domain has no subjects."""
    named = isinstance(side.prompts, Mapping)
    groups: dict[str, Any] = (
        dict(side.prompts) if isinstance(side.prompts, Mapping) else {"": side.prompts}
    )
    count = settings.pictures if named else settings.innocent_pictures
    found = []
    for subject, given in groups.items():
        texts = [given] if isinstance(given, str) else list(given)
        found += [(subject, texts[i % len(texts)]) for i in range(count)]
    return found


def complete(
    denoiser: Denoiser, guards: Sequence[Guarded], settings: EvaluateSettings
) -> list[Guarded]:
    """The guards, "none" first; raises `InputError` for those that cannot be."""
    own = parameters_of(denoiser.unet)
    taken: dict[str, list[int | None]] = {}
    for guard in guards:
        _check_names(denoiser, guard.frozen, guard.name)
        for name, tensor in guard.edit.items():
            if name not in own or own[name].shape != tensor.shape:
                raise InputError(
                    f"guard {guard.name}: base {denoiser.name} has no tensor {name} of that shape; the edit is for "
                    "another model"
                )
        if guard.name == NONE and (guard.frozen or guard.edit or guard.seed is not None):
            raise InputError(
                f"guard {NONE}: stands for the base as it is; give the guard another name"
            )
        if guard.seed is not None and guard.seed not in settings.seeds:
            raise InputError(
                f"guard {guard.name}: is for seed {guard.seed}, which is not among --seeds"
            )
        seeds = taken.setdefault(guard.name, [])
        if guard.seed in seeds or None in seeds or (seeds and guard.seed is None):
            raise InputError(
                f"guard {guard.name}: is there twice for a seed; give each a name of its own"
            )
        seeds.append(guard.seed)
    first = next((guard for guard in guards if guard.name == NONE), Guarded(NONE))
    return [first, *(guard for guard in guards if guard.name != NONE)]


def _check_names(denoiser: Denoiser, frozen: Sequence[str], guard: str) -> None:
    own = parameters_of(denoiser.unet)
    if unknown := [name for name in frozen if name not in own]:
        raise InputError(
            f"guard {guard}: base {denoiser.name} has no tensor {unknown[0]}; the mask is for another model"
        )
    if len(set(frozen)) == len(own):
        raise InputError(f"guard {guard}: freezes every tensor; nothing could be fine-tuned")


def check_sides(sides: Mapping[str, Side], settings: EvaluateSettings) -> None:
    for name, side in sides.items():
        for what, given in (
            ("training pictures", side.training), ("held-out pictures", side.held_out),
            ("real pictures", side.real), ("prompts", side.prompts),
        ):  # fmt: skip
            if not len(given):
                raise InputError(f"{name} domain: no {what}")
        shared = {_key(row) for row in side.training.latents} & {
            _key(row) for row in side.held_out.latents
        }
        if shared:
            raise InputError(
                f"{name} domain: {len(shared)} held-out pictures are training pictures too; take them out of one"
            )
        attackers = (
            settings.attackers
            if name == "illegal"
            else settings.innocent_attackers or settings.attackers
        )
        if any(ATTACKERS[one].extra["prior"] for one in attackers) and not side.class_prompt:
            raise InputError(
                f"{name} domain: dreambooth draws class pictures; give a class prompt (a photo of a person), or "
                "leave it out of the attackers"
            )
    illegal = sides["illegal"]
    if not isinstance(illegal.prompts, Mapping):
        raise InputError("illegal domain: prompts must be named by the subject that they ask for")
    if illegal.match is None and illegal.galleries is None:
        raise InputError(
            "illegal domain: nothing tells who is in a picture; give galleries, or a match"
        )


def _key(latent: Tensor) -> bytes:
    return bytes(latent.float().cpu().numpy().tobytes())
