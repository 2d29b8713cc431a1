"""The rules that turn figures into answers. Pure functions: no files, no randomness.

**Membership.** Levels by the sign-free AUC (max(AUC, 1 - AUC)) of an attack:

    low >= 0.55   medium >= 0.60   high >= 0.75   critical >= 0.90

Trying many attacks must not make a leak of luck. Of 100 audits of LoRAs that learned nothing at
most 5 may be given a level, however many attacks are tried and however they hang together: 4 by
the AUC, 1 by the few pictures that stand out.

- *AUC*: no level unless the p-value adjusted for all attacks (Holm's) is below 0.05 and the
  interval widened for k attacks, at 1 - 0.04/k (Bonferroni's), excludes 0.5. The estimate then gives
  the level, but at most one step above the one that the widened interval's lower end would give,
  so that five pictures cannot prove what a hundred should.
- *Few pictures* may be exposed while the average is not (Carlini et al. 2022). The TPR at 1 % and
  5 % FPR counts if so many members above that threshold have probability below 0.01/2k under
  guessing (exact: all orders of the pictures are equally likely). Its lower end at that level, 2, 5
  or 10 times the FPR to be expected there, makes it at least low, medium, high.
- The verdict rests on the attack with the worst level, then the surest, then the highest AUC.
- A control off chance refuses the claim, whatever the attacks say: members and non-members then
  differ by themselves. That is said before anything else.

Exposure, dataset inference and bounds on epsilon are evidence, and never change a level.

**Metadata.** The worst category of header entry: captions or pictures high; folders, paths or names
medium; counts, times, seeds, settings and entries nobody knows low.

The overall level is that of the worst question, never an average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffward.membership.statistics import newcombe_ci, signfree_interval, widened
from diffward.report.advice import membership_advice
from diffward.report.evidence import HOLM, auc_words, extra_needs, membership_evidence
from diffward.report.schema import (
    LEVELS,
    Attack,
    Claim,
    Leak,
    Level,
    Membership,
    Overall,
    Question,
)

AUC_STEPS: tuple[tuple[float, Level], ...] = (
    (0.90, "critical"),
    (0.75, "high"),
    (0.60, "medium"),
    (0.55, "low"),
)
TPR_STEPS: tuple[tuple[float, Level], ...] = ((10, "high"), (5, "medium"), (2, "low"))
TPR_KEYS = ("0.01", "0.05")
AUC_LUCK, TPR_LUCK = 0.04, 0.01  # shares of honest audits that may be given a level by luck
LEAK_LEVELS: dict[str, Level] = {
    "captions": "high",
    "pictures": "high",
    "folders": "medium",
    "paths": "medium",
    "names": "medium",
}
FEW = 20
# What is read for the metadata of a LoRA, a full model in one file, and one in a folder.
HEADERS = {
    "lora": "The file's header",
    "file": "The file's header",
    "folder": "The model's folder",
}

BUDGET = "none shown by these attacks within this budget"
NO_CLAIM = "No claim about membership can be made"

_MEMBERSHIP_WORDS: dict[Level, str] = {
    "critical": "can tell very reliably whether the picture was used for training.",
    "high": "can tell reliably whether the picture was used for training.",
    "medium": "can tell clearly better than by guessing whether the picture was used for training.",
    "low": "can tell a little better than by guessing whether the picture was used for training.",
}
_HEADLINES: dict[tuple[str, Level], str] = {
    ("membership", "critical"): "This file gives away which pictures it was trained on.",
    ("membership", "high"): "This file largely gives away which pictures it was trained on.",
    ("membership", "medium"): "This file partly gives away which pictures it was trained on.",
    ("membership", "low"): "This file hints at which pictures it was trained on.",
    ("identity", "high"): "This file gives away who is in the training pictures.",
    ("identity", "low"): "This file may give away who is in the training pictures.",
    ("copies", "high"): "What this file draws comes near its training pictures.",
    (
        "copies",
        "medium",
    ): "What this file draws comes nearer to its training pictures than to others.",
    (
        "copies",
        "low",
    ): "What this file draws comes a little nearer to its training pictures than to others.",
    ("prompt", "medium"): "This file lets a guessed training caption be confirmed.",
    ("prompt", "low"): "This file hints at its training captions.",
    ("dataset_size", "low"): "This file tells roughly how many pictures it was trained on.",
    ("metadata", "high"): "{header} spells out details of the training data.",
    ("metadata", "medium"): "{header} names folders, paths or people.",
    ("metadata", "low"): "{header} tells minor details of the training.",
}


def rank(level: Level | None) -> int:
    """Position of a level from harmless to worst; -1 for no level."""
    return -1 if level is None else LEVELS.index(level)


def metadata_question(leaks: Sequence[Leak], subject: str = "lora") -> Question:
    """What the header alone gives away; `subject` is a key of `HEADERS`."""
    if not leaks:
        return question(
            "metadata",
            "none_shown",
            "A model's folder has no training header. In its configuration and in the headers of its weights "
            "nothing was found that tells of the training data."
            if subject == "folder"
            else "Header: nothing found that tells of the training data.",
            statistic="entries",
            value=0.0,
        )
    level = max((LEAK_LEVELS.get(leak.get("category", ""), "low") for leak in leaks), key=rank)
    count = f"{len(leaks)} {'entry' if len(leaks) == 1 else 'entries'}"
    kinds = sorted({leak.get("category") or "unknown" for leak in leaks})
    return question(
        "metadata",
        level,
        f"{HEADERS[subject]} carries {count} that anyone can read without tools "
        f"({', '.join(kinds)}).",
        statistic="entries",
        value=float(len(leaks)),
        evidence=[f"{leak['key']}: {leak['reveals']}" for leak in leaks],
        advice=[
            "Remove these entries before sharing: diffward scrub FILE --out CLEAN.safetensors"
            if subject == "lora"
            else "Remove these entries before sharing, by hand: diffward scrub cleans LoRAs only."
        ],
    )


def ranked_attacks(attacks: Mapping[str, Attack]) -> list[str]:
    """Names, best first: the worst level, then the surest, then the highest sign-free AUC."""
    tried = len(attacks)

    def key(name: str) -> tuple[int, float, float]:
        attack = attacks[name]
        return (
            rank(membership_level(attack, tried)),
            _lower(attack, tried),
            attack["auc_signfree"],
        )

    return sorted(attacks, key=key, reverse=True)


def best_attack(attacks: Mapping[str, Attack]) -> str:
    """The attack on which the verdict rests."""
    return ranked_attacks(attacks)[0]


def membership_level(attack: Attack, attacks_tried: int = 1) -> Level:
    """The level of one attack's figures by the rules above; controls are not looked at."""
    return max(auc_level(attack, attacks_tried), tail_level(attack, attacks_tried)[0], key=rank)


def auc_level(attack: Attack, attacks_tried: int = 1) -> Level:
    """The level by the AUC alone."""
    lower = _lower(attack, attacks_tried)
    if lower <= 0.5 or not attack["p_holm"] < HOLM:
        return "none_shown"
    estimate, floor = step_level(attack["auc_signfree"], AUC_STEPS), step_level(lower, AUC_STEPS)
    return LEVELS[min(rank(estimate), rank(floor) + 1)]


def tail_level(attack: Attack, attacks_tried: int = 1) -> tuple[Level, str | None]:
    """The level by the pictures that stand out most, and the FPR at which they do."""
    from scipy.stats import beta, hypergeom, norm

    best: tuple[Level, str | None] = ("none_shown", None)
    members, others = attack["n_members"], attack["n_non_members"]
    luck = TPR_LUCK / (len(TPR_KEYS) * attacks_tried)
    for key in TPR_KEYS:
        tpr = attack["tpr_at_fpr"].get(key)
        hits = round((tpr or 0) * members)
        if not hits:
            continue
        wrong = int(np.floor(float(key) * others + 1e-9))
        # At least `hits` members lie above the threshold: among the highest hits + wrong scores
        # no more than `wrong` are of non-members.
        p_value = hypergeom.cdf(wrong, members + others, others, hits + wrong)
        p_value = norm.sf(norm.isf(p_value) / attack["inflation"])
        if not p_value < luck:
            continue
        lower = beta.ppf(luck, hits, members - hits + 1)
        expected = max(float(key), (wrong + 1) / (others + 1))
        level = step_level(lower / expected, TPR_STEPS)
        if rank(level) > rank(best[0]):
            best = (level, key)
    return best


def least_visible(attack: Attack, attacks_tried: int = 1) -> float:
    """The sign-free AUC from which an attack could have been told from luck, with these pictures."""
    from scipy.stats import norm

    m, n = attack["n_members"], attack["n_non_members"]
    noise = attack["inflation"] * float(np.sqrt((m + n + 1) / (12 * m * n)))
    return min(1.0, 0.5 + noise * float(norm.isf(AUC_LUCK / attacks_tried / 2)))


def worst_base_control(attacks: Mapping[str, Attack]) -> tuple[str, float] | None:
    """The attack whose base-model control lies farthest from 0.5, those off chance first, and its AUC."""
    known = {
        name: value
        for name, attack in attacks.items()
        if (value := attack["controls"]["base_model_auc"]) is not None
    }
    if not known:
        return None
    name = max(
        known,
        key=lambda n: (attacks[n]["controls"]["base_model_ok"] is False, abs(known[n] - 0.5)),
    )
    return name, known[name]


def failed_controls(attacks: Mapping[str, Attack]) -> list[str]:
    """One sentence for the blind control and one for those on the base model, where off chance."""
    found = []
    if blind := next((a for a in attacks.values() if a["controls"]["blind_ok"] is False), None):
        found.append(
            "A classifier that never saw the model tells the two groups of pictures apart "
            f"(AUC {auc_words(blind['controls']['blind_auc'])}; it should be near 0.5)."
        )
    failed = {n: a for n, a in attacks.items() if a["controls"]["base_model_ok"] is False}
    if worst := worst_base_control(failed):
        name, value = worst
        more = f" So do {len(failed) - 1} others." if len(failed) > 2 else ""
        more = " So does one other." if len(failed) == 2 else more
        found.append(
            f"The attack {name!r} tells them apart on the base model alone, which was never "
            f"trained on them (AUC {auc_words(value)}; it should be near 0.5).{more}"
        )
    return found


def membership_question(
    found: Membership,
    lora_rank: int | Sequence[int] | None = None,
    methods: Sequence[str] = (),
) -> Question:
    """Can someone tell which pictures the LoRA was trained on?

    Args:
        found: the `membership` part of the report.
        lora_rank: of the subject, for the advice.
        methods: of training that there are, for the advice.
    """
    attacks = found["attacks"]
    name = best_attack(attacks)
    best, tried = attacks[name], len(attacks)
    level = membership_level(best, tried)
    failed = failed_controls(attacks)
    few = min(best["n_members"], best["n_non_members"]) < FEW
    evidence = membership_evidence(
        found,
        name,
        level,
        refused=bool(failed),
        tail=tail_level(best, tried)[1],
        plain=_plain_attack(attacks, name),
        few=few,
    )
    figures = (
        "auc_signfree",
        best["auc_signfree"],
        list(best["auc_signfree_ci95"]),
        _controls_words(attacks, name),
    )
    if failed:
        statement = (
            f"{NO_CLAIM}: a control failed. {' '.join(failed)} The pictures differ by themselves, "
            "so the attacks' figures say nothing about this file."
        )
        advice = [
            "Take members and non-members at random from one source, saved and captioned the same "
            "way, and run the audit again."
        ]
        return question("membership", None, statement, "refused", *figures, evidence, advice)
    statement = _statement(found, best, level)
    advice = membership_advice(found, name, level, lora_rank, methods, few=few)
    return question("membership", level, statement, "made", *figures, evidence, advice)


def not_run_question(skipped: Mapping[str, str]) -> Question:
    """The answer where there were pictures but no attack could be run."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    return question(
        "membership",
        None,
        f"{NO_CLAIM}: no attack could be run ({reasons}).",
        "refused",
        advice=["Choose attacks that can be run: --attacks standard."],
    )


def overall(questions: Sequence[Question], subject: str = "lora") -> Overall:
    """The worst question. A refused question makes the whole "partial", or "refused" if all are.

    What was refused, and why, comes first in the headline. `subject` is a key of `HEADERS`.
    """
    made = [question for question in questions if question["level"] is not None]
    refused = [question for question in questions if question["claim"] == "refused"]
    if not made and not refused:
        return {"level": None, "claim": "refused", "headline": "No claim can be made."}
    whys = " ".join(_first_sentence(question["statement"]) for question in refused)
    if not made:
        return {"level": None, "claim": "refused", "headline": whys}
    # Of equals the one about pictures is named first: a header can be scrubbed in a second.
    order = {
        "metadata": 0,
        "dataset_size": 0,
        "prompt": 1,
        "copies": 2,
        "identity": 3,
        "membership": 4,
    }
    worst = max(made, key=lambda question: (rank(question["level"]), order[question["id"]]))
    level = worst["level"]
    assert level is not None
    if level == "none_shown":
        headline = f"Leaks: {BUDGET}."
    else:
        headline = _HEADLINES.get((worst["id"], level), worst["statement"])
        if worst["id"] == "metadata":
            headline = headline.format(header=HEADERS[subject])
        header = next((q for q in made if q["id"] == "metadata"), worst)
        if header is not worst and rank(header["level"]) > 0:
            headline += f" {HEADERS[subject]} tells of the training data, too."
    if refused:
        headline = f"{whys} {'Nothing else was found.' if level == 'none_shown' else headline}"
    return {"level": level, "claim": "partial" if refused else "made", "headline": headline}


def _statement(found: Membership, best: Attack, level: Level) -> str:
    tried = len(found["attacks"])
    if level != "none_shown":
        caption = ", a picture and the picture's caption"
        with_what = caption if found["captions"] == "known" else " and a picture"
        more = f", {extra}," if (extra := extra_needs(best)) else ""
        return (
            f"Whoever holds this file, its base model{with_what}{more} {_MEMBERSHIP_WORDS[level]}"
        )
    if _lower(best, tried) > 0.5 and best["p_holm"] < HOLM:
        return (
            f"Membership: a faint trace. The attacks do better than guessing, but by very little "
            f"(AUC {best['auc_signfree']:.2f}); no more was shown within this budget."
        )
    words = (
        f"Membership: {BUDGET}. They were not shown to tell training pictures from others better "
        "than guessing."
    )
    visible = min(least_visible(attack, tried) for attack in found["attacks"].values())
    many = "" if tried == 1 else f" and {tried} attacks tried"
    if visible >= 1:
        words += f" But with so few pictures{many} no leak whatever could have been told from luck."
    elif visible >= 0.6:
        words += (
            f" But with this many pictures{many} a leak below AUC {visible:.2f} could go unnoticed."
        )
    return words


def _plain_attack(attacks: Mapping[str, Attack], best: str) -> tuple[str, Level] | None:
    """The best attack that needs nothing extra, and its level, if the best of all does."""
    plain = [name for name in ranked_attacks(attacks) if not extra_needs(attacks[name])]
    if best in plain or not plain:
        return None
    return plain[0], membership_level(attacks[plain[0]], len(attacks))


def _controls_words(attacks: Mapping[str, Attack], name: str) -> str:
    controls = attacks[name]["controls"]
    words = f"base model AUC {auc_words(controls['base_model_auc'])}"
    worst = worst_base_control(attacks)
    if worst and worst[0] != name:
        words += f" (farthest from 0.5 of all attacks: {auc_words(worst[1])}, {worst[0]})"
    return f"{words}, blind classifier AUC {auc_words(controls['blind_auc'])}"


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".") + "."


def step_level(value: float, steps: tuple[tuple[float, Level], ...]) -> Level:
    """The level of the first bound that a value reaches."""
    return next((level for bound, level in steps if value >= bound), "none_shown")


def _lower(attack: Attack, tried: int) -> float:
    """Lower end of the sign-free interval at 1 - 0.04 / tried.

    The wider of Newcombe's at that level, inflated, and the 95 % interval stretched to it, which
    carries what else that one allows for: ties, unequal spread, groups.
    """
    from scipy.stats import norm

    value, level = attack["auc"], 1 - AUC_LUCK / tried
    low, high = attack["auc_ci95"]
    stretch = norm.isf((1 - level) / 2) / norm.isf(0.025)
    stretched = widened(value, (low, high), max(1.0, float(stretch)))
    score = newcombe_ci(value, attack["n_members"], attack["n_non_members"], level)
    score = widened(value, score, attack["inflation"])
    return signfree_interval((min(stretched[0], score[0]), max(stretched[1], score[1])))[0]


def question(
    ident: str,
    level: Level | None,
    statement: str,
    claim: Claim = "made",
    statistic: str | None = None,
    value: float | None = None,
    ci95: list[float] | None = None,
    control: str | None = None,
    evidence: Sequence[str] = (),
    advice: Sequence[str] = (),
) -> Question:
    return {
        "id": ident,
        "level": level,
        "claim": claim,
        "statement": statement,
        "statistic": statistic,
        "value": value,
        "ci95": ci95,
        "control": control,
        "evidence": list(evidence),
        "advice": list(advice),
    }
