"""Rules that turn findings about weights into answers. Pure functions.

**Identity.** The p-value is the largest of three: strangers of a gallery that are as near to what the weights say, other
LoRAs' readings that are as near to the subject, and the file's own weights shuffled. At most 1 in 40 harmless files can
be given a level: low below 0.025, high below 0.01. The pictures of the page never change a level.

**Words.** The training caption must fit the weights better than it fits other LoRAs, and than random words of its
length do: low below 0.05, medium below 0.02.

**Copies.** Pictures are drawn with extrapolated guidance. Training pictures must come nearer to them than held-out
ones do (one-sided Mann-Whitney test, all ways of drawing allowed for); if the base model's own pictures do that too,
no claim is made.

**Number of pictures.** Only where the reading beats a constant on held-out LoRAs by a tenth is there an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from diffward.inversion.findings import IdentityFinding, SizeFinding, SubjectFinding
from diffward.inversion.prompt import CaptionFit
from diffward.report.schema import Level, Question
from diffward.report.verdict import AUC_STEPS, BUDGET, rank, step_level

IDENTITY_STEPS: tuple[tuple[float, Level], ...] = ((0.01, "high"), (0.025, "low"))
PROMPT_STEPS: tuple[tuple[float, Level], ...] = ((0.02, "medium"), (0.05, "low"))
SUBJECT_P, COPIES_P, SKILL = 0.02, 0.01, 0.1


def identity_question(
    found: IdentityFinding, subject: SubjectFinding | None, accuracy: Mapping[str, Any]
) -> Question:
    """Can someone tell who is in the training pictures, from the file alone? Asked with the owner's pictures.

    Args:
        accuracy: what the inverter reaches on held-out LoRAs, as `judge.Retrieval.figures` has it.
    """
    level = _below(found.p_value, IDENTITY_STEPS)
    ahead = found.rank - 1
    where = (
        f"Among {found.gallery} strangers and the subject of your pictures, the weights point to your subject first."
        if not ahead
        else f"Of {found.gallery} strangers {ahead} look more like what the weights say than the subject of your pictures does."
    )
    if level == "none_shown":
        statement = f"Identity: {BUDGET}. {where}"
    else:
        statement = (
            "Whoever holds this file can tell who is in the training pictures, without a prompt, without a picture, and "
            f"without running the model. {where}"
        )
    evidence = [
        f"Rank {found.rank} of {found.gallery + 1} (p = {found.p_gallery:.2g}); by ridge regression, the simplest "
        f"reader there is, rank {found.floor_rank}.",
        f"Controls: of {found.others} LoRAs of other subjects {_count(found.p_others, found.others)} read as near to yours; of "
        f"{found.shuffles} random orders of this file's own weights, {_count(found.p_shuffled, found.shuffles)}.",
        accuracy_words(accuracy),
        *_subject_words(subject),
    ]
    advice = []
    if level != "none_shown":
        advice = [
            "Do not share this file where it must stay secret who is in the pictures: fewer steps or a lower rank do not hide it "
            "(docs/weights.md has the figures)."
        ]
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


def prompt_question(found: CaptionFit, decoded: str | None, times: int, pictures: int) -> Question:
    """Can the training words be read back?

    Args:
        decoded: what was decoded blindly, as long as the caption; None if that was not tried.
        times: pictures that have this caption, of `pictures`.
    """
    level = _below(found.p_value, PROMPT_STEPS)
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
        f"random words of its length that fit as well: p = {found.p_words:.2g}.",
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


def copies_question(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], count: int) -> Question:
    """Does it draw copies of training pictures?

    Args:
        scores: by way of drawing, how near anything drawn comes to each training picture and to each held-out one;
            a name that ends with "by the base alone" is a control.
        count: pictures drawn each way.
    """
    from scipy.stats import mannwhitneyu

    ways = {name: tuple(map(np.asarray, pair)) for name, pair in scores.items()}
    found = {}
    for name, (members, others) in ways.items():
        test = mannwhitneyu(members, others, alternative="greater")
        found[name] = float(test.statistic / (len(members) * len(others))), float(test.pvalue)
    own = {name: value for name, value in found.items() if not name.endswith("by the base alone")}
    name = max(own, key=lambda n: own[n][0])
    auc, p_value = own[name][0], min(1.0, own[name][1] * len(own))
    controls = {n: value for n, value in found.items() if n not in own}
    worst = max(controls, key=lambda n: controls[n][0])
    control, control_p = controls[worst]
    if control_p * len(controls) < COPIES_P:
        return {
            **_question("copies", "none_shown", "", "auc", auc, None, f"base model AUC {control:.2f}", [], []),
            "level": None, "claim": "refused",
            "statement": "No claim about copies can be made: the base model's own pictures come nearer to the training pictures "
            f"than to the held-out ones ({worst}: {round(100 * control)} times in 100), so the two differ by themselves.",
        }  # fmt: skip
    level: Level = step_level(auc, AUC_STEPS) if p_value < COPIES_P else "none_shown"
    members, others = ways[name]
    nearer = int((members > others.max()).sum())
    evidence = [
        f"{count} pictures were drawn for {name} with extrapolated guidance. A training picture comes nearer to one of them "
        f"than a held-out one {round(100 * auc)} times in 100 (p = {p_value:.2g}); by the base alone {round(100 * control)} times.",
        f"{nearer} of {len(members)} training pictures are nearer than every one of {len(others)} held-out ones.",
    ]
    if level == "none_shown":
        statement = f"Copies: {BUDGET}. What the model draws comes no nearer to training pictures than to others."
        return _question(
            "copies",
            level,
            statement,
            "auc",
            auc,
            None,
            f"base model AUC {control:.2f}",
            evidence,
            [],
        )
    return _question(
        "copies", level,
        "What the model draws when pushed comes nearer to the training pictures than to others of the same kind.",
        "auc", auc, None, f"base model AUC {control:.2f}", evidence,
        ["Train for fewer passes, or on more pictures: copies come with over-training."],
    )  # fmt: skip


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
    return [
        f"LoRAs without such a subject look the same to the reader ({_count(subject.p_value, subject.empty)} of {subject.empty})."
    ]


def _count(p_value: float, cases: int) -> int:
    """How many cases did as well, from (1 + those) / (1 + all)."""
    return round(p_value * (1 + cases)) - 1


def _below(value: float, steps: tuple[tuple[float, Level], ...]) -> Level:
    return next((level for bound, level in steps if value < bound), "none_shown")


def _question(
    ident: str, level: Level, statement: str, statistic: str | None, value: float | None, ci95: list[float] | None,
    control: str | None, evidence: list[str], advice: list[str],
) -> Question:  # fmt: skip
    assert rank(level) >= 0
    return {
        "id": ident, "level": level, "claim": "made", "statement": statement, "statistic": statistic, "value": value,
        "ci95": ci95, "control": control, "evidence": evidence, "advice": advice,
    }  # fmt: skip
