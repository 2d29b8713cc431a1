"""Rules that turn findings about weights into answers. Pure functions.

**Identity.** The p-value is the largest of three: strangers of a gallery that are as near to what the weights say, other
LoRAs' readings that are as near to the subject, and the file's own weights shuffled. At most 1 in 40 harmless files can
be given a level: low below 0.025, high below 0.01; none where three in ten LoRAs without a subject look as much as if they
had one, and no claim where the pictures show more than one. The pictures of the page never change a level.

**Words.** The training caption must fit the weights better than it fits other LoRAs, and than random words of its
length do: low below 0.05, medium below 0.02.

**Copies.** Pictures are drawn with extrapolated guidance, and by the base alone from the same captions and noise. What is drawn
must have moved towards training pictures more than towards held-out ones (one-sided Mann-Whitney test); if the base's own
pictures are nearer to them already, no claim is made. Nearness is no copy: never more than high.

**Number of pictures.** Only where the reading beats a constant on held-out LoRAs by a tenth is there an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffward.inversion.findings import IdentityFinding, SizeFinding, SubjectFinding
from diffward.inversion.prompt import CaptionFit
from diffward.membership.statistics import newcombe_ci
from diffward.report.schema import LEVELS, Level, Question
from diffward.report.verdict import AUC_STEPS, BUDGET, question, rank, step_level

IDENTITY_STEPS: tuple[tuple[float, Level], ...] = ((0.01, "high"), (0.025, "low"))
PROMPT_STEPS: tuple[tuple[float, Level], ...] = ((0.02, "medium"), (0.05, "low"))
SUBJECT_P, COPIES_P, SKILL = 0.02, 0.01, 0.1
SUBJECT_GATE = 0.3  # chosen by `bench weight-inversion`, part gate
SPREAD = (
    4.0  # how much more than pictures of one subject those may differ that are called one subject's
)


def identity_question(
    found: IdentityFinding, subject: SubjectFinding | None, accuracy: Mapping[str, Any]
) -> Question:
    """Can someone tell who is in the training pictures, from the file alone? Asked with the owner's pictures.

    Args:
        accuracy: what the inverter reaches on held-out LoRAs, as `judge.Retrieval.figures` has it.
    """
    if found.spread > SPREAD:
        return _refused(
            "identity",
            "No claim about identity can be made: the training pictures do not show one subject (they differ among "
            f"themselves {found.spread:.0f} times as much as pictures of one subject do). Ask with the pictures of one subject.",
        )
    level = _below(found.p_value, IDENTITY_STEPS)
    if subject is not None and not subject.p_value < SUBJECT_GATE:
        level = "none_shown"
    ahead = found.rank - 1
    where = (
        f"Among {found.gallery} strangers and the subject of your pictures, the weights point to your subject first."
        if not ahead
        else f"Of {found.gallery} strangers {ahead} {'looks' if ahead == 1 else 'look'} at least as much like what the weights "
        "say as the subject of your pictures does."
    )
    if level == "none_shown":
        statement = f"Identity: {BUDGET}. {where}"
    else:
        what = (
            "can tell who is in the training pictures"
            if not ahead
            else f"can narrow down who is in the training pictures to {found.rank} of {found.gallery + 1}"
        )
        statement = f"Whoever holds this file {what}, without a prompt, without a picture, and without running the model. {where}"
    evidence = [
        f"Rank {found.rank} of {found.gallery + 1} (p = {found.p_gallery:.2g}) by ridge regression, the simplest reader there "
        f"is; by the network, rank {found.encoder_rank}.",
        f"Controls: of {found.others} LoRAs of other subjects {_count(found.p_others, found.others)} read as near to yours; of "
        f"{found.shuffles} random orders of this file's own weights, {_count(found.p_shuffled, found.shuffles)}.",
        accuracy_words(accuracy),
        *_subject_words(subject),
    ]
    advice = []
    if level != "none_shown":
        advice = ["Do not share this file where it must stay secret who is in the pictures."]
    return _question(
        "identity", level, statement, "p_value", found.p_value, None,
        f"other LoRAs p {found.p_others:.2g}, shuffled weights p {found.p_shuffled:.2g}", evidence, advice,
    )  # fmt: skip


def subject_question(subject: SubjectFinding | None, accuracy: Mapping[str, Any]) -> Question:
    """The same without pictures of the owner's: whether the weights hold a subject, never who it is."""
    if subject is None or not subject.p_value < SUBJECT_P:
        return _question(
            "identity", "none_shown",
            f"Identity: {BUDGET}. The weights were not shown to hold one subject of the kind that the reader knows.",
            None if subject is None else "p_value", None if subject is None else subject.p_value, None, None,
            _subject_words(subject), [],
        )  # fmt: skip
    statement = (
        "The weights hold one subject, sharp enough that someone with candidates could look for it. Give the training "
        "pictures and similar ones (--members, --non-members) to see whether this file points to it; without them no "
        "attributes and no pictures are shown."
    )
    return _question(
        "identity", "low", statement, "p_value", subject.p_value, None, f"{subject.empty} LoRAs without a subject",
        [*_subject_words(subject), accuracy_words(accuracy)], [],
    )  # fmt: skip


def prompt_level(found: CaptionFit) -> Level:
    return _below(found.p_value, PROMPT_STEPS)


def prompt_question(found: CaptionFit, decoded: str | None, times: int, pictures: int) -> Question:
    """Can the training words be read back?

    Args:
        decoded: what was decoded blindly, as long as the caption; None if that was not tried.
        times: pictures that have this caption, of `pictures`.
    """
    level = prompt_level(found)
    if level == "none_shown":
        statement = (
            f"Words: {BUDGET}. The caption was not shown to fit these weights better than others."
        )
    else:
        statement = (
            "Whoever guesses the caption can confirm it from the weights: it fits them better than it fits other LoRAs, and "
            "better than other words do."
        )
    evidence = [
        f"Asked of the caption of {times} of {pictures} pictures. Other LoRAs that it fits as well: p = {found.p_others:.2g}; "
        f"random words of its length that fit as well: p = {found.p_words:.2g}"
        + (
            "."
            if found.p_rivals is None
            else f"; captions of held-out pictures: p = {found.p_rivals:.2g}."
        ),
    ]
    if decoded is not None:
        evidence.append(f"Read without knowing it, word by word, the weights say “{decoded}”.")
    return _question(
        "prompt", level, statement, "p_value", found.p_value, None, f"other LoRAs p {found.p_others:.2g}", evidence,
        ["Train with a neutral caption where the words themselves must stay private."] if level != "none_shown" else [],
    )  # fmt: skip


def size_question(found: SizeFinding, pictures: int | None) -> Question:
    """Can someone tell how many pictures were used? `pictures`: how many the owner gave, for comparison."""
    low, high = found.interval
    told = f"{found.pictures:.0f} (95 % interval {low:.0f} to {high:.0f})"
    evidence = [
        f"On held-out LoRAs the reading saves {max(0.0, found.skill):.0%} of the error of always saying the same number."
    ]
    if pictures is not None:
        evidence.append(f"You gave {pictures} training pictures.")
    if found.skill < SKILL:
        return _question(
            "dataset_size", "none_shown",
            f"Number of pictures: {BUDGET}. Where rank, rate and length vary, the reading is hardly better than a guess.",
            "pictures", found.pictures, [low, high], None, [f"It says {told}.", *evidence], [],
        )  # fmt: skip
    return _question(
        "dataset_size", "low", f"The weights tell roughly how many pictures were used: {told}.", "pictures",
        found.pictures, [low, high], None, evidence, [],
    )  # fmt: skip


def copies_question(
    model: tuple[ArrayLike, ArrayLike],
    base: tuple[ArrayLike, ArrayLike],
    count: int,
    *,
    named: bool,
) -> Question:
    """Does it draw copies of training pictures?

    Args:
        model: how near anything that the model draws comes to each training picture (m,) and to each held-out one (n,).
        base: the same of what the base alone draws from the same captions and noise.
        count: pictures drawn by either.
        named: whether captions were used, as many of either side.
    """
    (members, others), (before, beside) = (tuple(map(np.asarray, pair)) for pair in (model, base))
    control, control_p, _ = _nearer(before, beside)
    if control_p < COPIES_P:
        return _refused(
            "copies",
            "No claim about copies can be made: the base model's own pictures come nearer to the training pictures than to the "
            f"held-out ones ({round(100 * control)} times in 100), so the two differ by themselves.",
        )
    auc, p_value, low = _nearer(members - before, others - beside)
    level: Level = "none_shown"
    if p_value < COPIES_P and low > 0.5:
        # Few pictures prove less than their estimate; nearness alone is never more than high.
        steps = step_level(auc, AUC_STEPS), step_level(low, AUC_STEPS)
        level = LEVELS[min(rank(steps[0]), rank(steps[1]) + 1, rank("high"))]
    nearest = int((members > max(others.max(), before.max(), beside.max())).sum())
    how = "the captions of both sides" if named else "the empty caption"
    evidence = [
        f"{count} pictures were drawn for {how} with extrapolated guidance, and as many by the base alone from the same noise. What "
        f"is drawn moved towards a training picture more than towards a held-out one {round(100 * auc)} times in 100 "
        f"(p = {p_value:.2g}; guessing gives 50).",
        f"{nearest} of {len(members)} training pictures have something drawn nearer to them than to any of {len(others)} held-out ones.",
    ]
    figures = ("auc", auc, None, f"base model AUC {control:.2f}")
    if level == "none_shown":
        statement = f"Copies: {BUDGET}. What the model draws was not shown to come nearer to training pictures than to others."
        return _question("copies", level, statement, *figures, evidence, [])
    return _question(
        "copies", level,
        "What the model draws when pushed comes nearer to the training pictures than to others of the same kind.", *figures,
        evidence, ["Train for fewer passes, or on more pictures: copies come with over-training."],
    )  # fmt: skip


def _nearer(members: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """AUC of members' scores above others', its one-sided p-value, and the lower end of its 95 % interval."""
    from scipy.stats import mannwhitneyu

    test = mannwhitneyu(members, others, alternative="greater")
    auc = float(test.statistic / (len(members) * len(others)))
    return auc, float(test.pvalue), newcombe_ci(auc, len(members), len(others))[0]


def accuracy_words(accuracy: Mapping[str, Any]) -> str:
    """How good the reader is on LoRAs that it never saw."""
    return (
        f"On {accuracy['victims']} LoRAs of subjects that it never saw, this reader puts the right one first of "
        f"{accuracy['gallery'] + 1} in {accuracy['top1']:.0%}, among the first ten in {accuracy['top10']:.0%}."
    )


def _subject_words(subject: SubjectFinding | None) -> list[str]:
    if subject is None:
        return []
    if subject.p_value < SUBJECT_P:
        return [
            f"The weights hold a subject of the kind that the reader knows (p = {subject.p_value:.2g})."
        ]
    alike = f"{_count(subject.p_value, subject.empty)} of {subject.empty} LoRAs without such a subject look as much as if they held one"
    if subject.p_value < SUBJECT_GATE:
        return [f"{alike}: too few to speak against it."]
    return [f"{alike}: no claim is made about who it is."]


def _refused(ident: str, statement: str) -> Question:
    return question(ident, None, statement, "refused")


def _count(p_value: float, cases: int) -> int:
    """How many cases did as well, from (1 + those) / (1 + all)."""
    return round(p_value * (1 + cases)) - 1


def _below(value: float, steps: tuple[tuple[float, Level], ...]) -> Level:
    return next((level for bound, level in steps if value < bound), "none_shown")


def _question(
    ident: str, level: Level, statement: str, statistic: str | None, value: float | None, ci95: list[float] | None,
    control: str | None, evidence: list[str], advice: list[str],
) -> Question:  # fmt: skip
    return question(
        ident, level, statement, "made", statistic, value, ci95, control, evidence, advice
    )
