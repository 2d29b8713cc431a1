"""The part of an audit that starts from the weights alone: who, which words, how many pictures, copies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffward.errors import InputError
from diffward.report.drawn import CLASS_PROMPTS, Drawn, draw_from_weights, drawn_words
from diffward.report.schema import Question
from diffward.report.weights_verdict import (
    copies_question,
    identity_question,
    prompt_level,
    prompt_question,
    size_question,
    subject_question,
)

if TYPE_CHECKING:
    from diffward.inversion.inverter import Inverter
    from diffward.lora import LoraWeights
    from diffward.models.denoiser import Denoiser
    from diffward.models.eyes import Eye
    from diffward.report.sides import Sides

AUTO_LATENTS = 16 * 16  # copies are looked for without being asked for up to this size of latents
DRAWN, DRAW_STEPS = 32, 10
SMALL_VOCABULARY = 5000


@dataclass(frozen=True)
class WeightsOptions:
    """What is asked of the weights.

    Attributes:
        inverter: file of `diffward inverter train`; the shipped one for the base by default, if there is one.
        eye: what the inverter learned with, where it is to be found here; by default under the name that it had.
        draws: pictures drawn to look for copies; None: 32 where the latents are small, else none.
        captions: whether pictures for copies may be drawn for the captions.
        class_prompt: what any picture of the kind would be called, for comparison; known by itself where the inverter
            learned from people of `mini`'s world.
        enabled: whether anything is asked.
    """

    inverter: Path | None = None
    eye: str | None = None
    draws: int | None = None
    captions: bool = True
    class_prompt: str = ""
    enabled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws is not None and self.draws < 0:
            raise InputError(f"--draws {self.draws}: must be 0 or above")


def audit_weights(
    denoiser: Denoiser, weights: LoraWeights, sides: Sides | None, options: WeightsOptions
) -> tuple[list[Question], list[Drawn], list[str]]:
    """The questions about weights, pictures for the page (only beside pictures of the owner's), and notes.

    Args:
        weights: as read from the file; attached to `denoiser` where something is drawn. What is attached is taken off.
        sides: the owner's pictures; without them there are scores and no pictures (guard rail).
    """
    from diffward.inversion.inverter import open_inverter

    if not options.enabled:
        return [], [], []
    denoiser.detach()  # all that is read is compared with the bare base
    inverter = open_inverter(options.inverter, denoiser)
    weights = weights.resolve(denoiser.module_shapes())
    questions: list[Question] = []
    drawn: list[Drawn] = []
    notes: list[str] = []

    def identity() -> None:
        if inverter is None:
            raise InputError(
                "no inverter for this base is known (diffward zoo build, diffward inverter train)"
            )
        found, pictures = _read(inverter, denoiser, weights, sides, options, notes)
        questions.extend(found)
        drawn.extend(pictures)

    def prompt() -> None:
        if sides is not None and any(sides.members.captions):
            questions.append(_prompt(inverter, denoiser, weights, sides, options))

    def copies() -> None:
        if sides is not None and (count := _draws(denoiser, options)):
            questions.append(_copies(inverter, denoiser, weights, sides, count, options))

    # What cannot be asked of this file or base is noted; the rest of the audit stands.
    for name, ask in (("identity", identity), ("prompt", prompt), ("copies", copies)):
        try:
            ask()
        except InputError as error:
            notes.append(f"{name}: not asked: {error}")
    denoiser.detach()
    return questions, drawn, notes


def _read(
    inverter: Inverter,
    denoiser: Denoiser,
    weights: LoraWeights,
    sides: Sides | None,
    options: WeightsOptions,
    notes: list[str],
) -> tuple[list[Question], list[Drawn]]:
    from diffward.inversion.findings import identity_finding, size_finding, subject_finding

    tokens = inverter.tokens(weights, denoiser)
    subject, accuracy = subject_finding(inverter, tokens), inverter.facts.held_out["floor"]
    size = size_question(size_finding(inverter, tokens), len(sides.members) if sides else None)
    if sides is None:
        return [subject_question(subject, accuracy), size], []
    try:
        eye = _eye(inverter, denoiser, options)
        pixels = sides.members.pixels(denoiser.resolution)
        features = eye.features(pixels)
    except InputError as error:
        notes.append(f"identity: not asked: {error}")
        return [size], []
    finding = identity_finding(inverter, tokens, features, options.seed)
    question = identity_question(finding, subject, accuracy)
    if question["level"] in (None, "none_shown"):
        # Whoever has other pictures than the subject's sees none of the subject.
        return [question, size], []
    if inverter.facts.drawn["latents"] != list(denoiser.latent_shape):
        notes.append("no pictures are drawn: the inverter's decoders are for another resolution")
        return [question, size], []
    real = pixels, features, sides.members
    class_prompt = options.class_prompt or CLASS_PROMPTS.get(inverter.facts.zoo["subjects"], "")
    with_lora = inverter, denoiser, weights
    denoise = _draws(denoiser, options) > 0
    if not denoise and options.draws is None:
        notes.append("latents of this size take a GPU: the models draw no pictures; --draws 32 draws them all the same")  # fmt: skip
    drawn = draw_from_weights(with_lora, tokens, eye, real, class_prompt, options.seed, denoise)
    question["evidence"].append(drawn_words(drawn))
    return [question, size], drawn


def _prompt(
    inverter: Inverter | None,
    denoiser: Denoiser,
    weights: LoraWeights,
    sides: Sides,
    options: WeightsOptions,
) -> Question:
    """The most frequent caption, under the file's evidence and under other LoRAs'."""
    from collections import Counter

    from diffward.inversion.prompt import Words, caption_fit, decode, evidence, metric

    if inverter is None or not len(inverter.text_others):
        raise InputError("without an inverter there are no other LoRAs to compare with; not asked")
    caption, times = Counter(c for c in sides.members.captions if c).most_common(1)[0]
    found, words = evidence(weights), Words(denoiser, options.seed)
    others = inverter.text_others
    discounted = metric(inverter.moment)
    rivals = [c for c in sides.non_members.captions if c]
    fit = caption_fit(found, others, words, caption, discounted, rivals, seed=options.seed)
    guess = None
    # Every word of the vocabulary goes through the text encoder for every word decoded.
    cheap = len(words.tokens) <= SMALL_VOCABULARY or denoiser.device.type == "cuda"
    if cheap and prompt_level(fit) != "none_shown":
        length = min(6, len(words.ids(caption)))
        guess = decode(found, words, length=length, metric=discounted)[0].text
    return prompt_question(fit, guess, times, len(sides.members))


def _copies(
    inverter: Inverter | None,
    denoiser: Denoiser,
    weights: LoraWeights,
    sides: Sides,
    count: int,
    options: WeightsOptions,
) -> Question:
    """Pictures drawn with extrapolated guidance, near training pictures or as near others; and the base's own."""
    from diffward.inversion.extraction import copy_scores, draw

    eye = _copies_eye(inverter, denoiser, options)
    members, others = (
        eye.features(s.pixels(denoiser.resolution)) for s in (sides.members, sides.non_members)
    )
    centre = others.mean(0)
    # As many captions of either side: a model that follows its prompt must not come nearer to one side by that.
    texts = [""]
    if options.captions:
        kinds = (
            [c for c in dict.fromkeys(side.captions) if c]
            for side in (sides.members, sides.non_members)
        )
        texts = [c for pair in zip(*kinds, strict=False) for c in pair][:8] or [""]
    reference = denoiser.condition(texts)  # before the LoRA, which may change the text encoder
    denoiser.attach(weights)
    conditioning = denoiser.condition(texts)
    near: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, weight in (("model", 3.0), ("base", 0.0)):
        made = draw(
            denoiser, conditioning, count=count, weight=weight, steps=DRAW_STEPS, seed=options.seed,
            reference=reference,
        )  # fmt: skip
        features = eye.features(made)
        near[name] = copy_scores(features, members, centre), copy_scores(features, others, centre)
    return copies_question(near["model"], near["base"], count, named=texts != [""])


def _draws(denoiser: Denoiser, options: WeightsOptions) -> int:
    if options.draws is not None:
        return options.draws
    height, width = denoiser.latent_shape[1:]
    return DRAWN if height * width <= AUTO_LATENTS or denoiser.device.type == "cuda" else 0


def _eye(inverter: Inverter, denoiser: Denoiser, options: WeightsOptions) -> Eye:
    """The inverter's own. Raises InputError: it is not here, it is another, or it cannot see pictures of this size."""
    from diffward.inversion.inverter import check_eye
    from diffward.models.eyes import open_eye

    return check_eye(
        inverter.facts, open_eye(options.eye or inverter.facts.eye, str(denoiser.device))
    )


def _copies_eye(inverter: Inverter | None, denoiser: Denoiser, options: WeightsOptions) -> Eye:
    """The same, or what every base has: the autoencoder's latents."""
    from diffward.models.eyes import Latents

    side = denoiser.resolution
    try:
        if inverter is not None:
            eye = _eye(inverter, denoiser, options)
            eye.features(np.zeros((1, side, side, 3), np.uint8))
            return eye
    except InputError:
        pass
    return Latents(denoiser)
