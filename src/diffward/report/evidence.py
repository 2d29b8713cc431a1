"""What the membership figures mean, in words. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from diffward.report.schema import (
    Attack,
    DatasetInference,
    EpsilonBound,
    Exposure,
    Level,
    Membership,
)

HOLM = 0.05  # below it, an attack is better than guessing, however many were tried
FEW_PASSES = 10.0
MANY_PASSES = 50.0

# What the words of an attack's `access` mean for who can run it.
_NEEDS = {
    "known members": "and knows some of the training pictures already",
    "shadow": "and trains LoRAs of the same kind on pictures like these",
    "known non-members": "and has similar pictures that were not used",
}


def membership_evidence(
    found: Membership,
    name: str,
    level: Level,
    *,
    refused: bool,
    tail: str | None,
    plain: tuple[str, Level] | None,
    few: bool,
) -> list[str]:
    """The lines under the answer about membership, the best attack (`name`) first.

    Args:
        level: what the best attack alone would say.
        refused: a control failed: figures are for the record only, and what rests on them is left out.
        tail: the FPR at which a few pictures stand out ("0.01" or "0.05"), if they do.
        plain: the best attack of those that need nothing but file, base and picture, and its level,
            where the best of all needs more.
        few: so few pictures that the intervals are wide.
    """
    best, tried = found["attacks"][name], len(found["attacks"])
    lines = [in_hundred(name, best, tried)]
    if refused:
        lines[0] = f"For the record only, it proves nothing here: {lines[0]}"
    elif tried > 1 and level == "none_shown" and not best["p_holm"] < HOLM:
        lines[0] = luck_words(name, best, tried)
    elif tried > 1:
        p_value = p_words(best["p_holm"])
        lines.append(
            f"That is the best of {tried} tries. Luck among so many is allowed for ({p_value})."
        )
    if best["auc"] < 0.5 and level != "none_shown" and not refused:
        lines.append(
            f"The AUC lies below one half ({best['auc']:.2f}): training pictures stand out by scoring "
            "lower than others. That gives them away just as well, so it counts as a leak."
        )
    if plain and level != "none_shown" and not refused:
        lines.append(plain_words(plain[0], found["attacks"][plain[0]], plain[1]))
    if tail and not refused:
        lines.append(tail_words(best, tail))
    if found["exposure"]:
        lines.append(passes_words(found["exposure"]))
    if not refused:
        if found["dataset_inference"]:
            lines.append(together_words(found["dataset_inference"]))
        if found["epsilon"]:
            lines.append(epsilon_words(found["epsilon"]))
    if found["captions"] == "unknown":
        lines.append(
            "The attacks were not given the captions. Someone who knows them may find more."
        )
    if few:
        lines.append(
            f"Only {best['n_members']} training pictures and {best['n_non_members']} others were "
            "compared. With a handful of pictures the intervals are wide: read the range, not the "
            "number."
        )
    return lines + _unchecked(best)


def in_hundred(name: str, attack: Attack, tried: int) -> str:
    """The best attack's AUC as something one can picture."""
    low, high = (round(100 * end) for end in attack["auc_signfree_ci95"])
    which = "the attack" if tried == 1 else f"the best of {tried} attacks"
    return (
        f"Shown one training picture and one other, {which} ({name}) tells which is which "
        f"{round(100 * attack['auc_signfree'])} times in 100; guessing gives 50. "
        f"The true figure is likely between {low} and {high} (95 % interval)."
    )


def luck_words(name: str, attack: Attack, tried: int) -> str:
    """The same where the best of many tries is no better than luck would make it."""
    low, high = (round(100 * end) for end in attack["auc_signfree_ci95"])
    return (
        f"Shown one training picture and one other, the best of {tried} attacks ({name}) tells which "
        f"is which {round(100 * attack['auc_signfree'])} times in 100 (95 % interval {low} to {high}); "
        f"guessing gives 50. The best of {tried} tries always looks a little better than guessing: "
        f"allowing for that, so much can be luck ({p_words(attack['p_holm'])})."
    )


def extra_needs(attack: Attack) -> str:
    """What an attacker needs besides file, base model and picture; empty if nothing."""
    access = attack["access"].lower()
    return next((words for key, words in _NEEDS.items() if key in access), "")


def plain_words(name: str, attack: Attack, level: Level) -> str:
    """What is left for an attacker without what `extra_needs` says."""
    if level == "none_shown":
        return "For someone without that, nothing was shown to be better than guessing."
    return (
        f"Someone without that still tells which is which {round(100 * attack['auc_signfree'])} times "
        f"in 100 ({name})."
    )


def tail_words(attack: Attack, key: str) -> str:
    """What a TPR at a low FPR says."""
    found = round(100 * (attack["tpr_at_fpr"][key] or 0))
    return (
        f"Some pictures are more exposed than the average: a threshold that wrongly names "
        f"{round(100 * float(key))} of 100 other pictures finds {found} of 100 training pictures."
    )


def passes_words(exposure: Exposure) -> str:
    """How often training saw each picture, and what that usually means."""
    passes = exposure["passes"]
    source = (
        "the file's header" if exposure["source"] == "header" else f"{exposure['source']} beside it"
    )
    words = f"Training saw each picture about {count_words(passes)} times, says {source}; "
    if passes < MANY_PASSES:
        return words + "ten can be enough to tell, and the more often, the more is remembered."
    return words + "so many usually make a model remember single pictures."


def together_words(found: DatasetInference) -> str:
    """What the training pictures show as a set (dataset inference)."""
    p_value = p_words(found["p_value"])
    if not found["p_value"] < found["alpha"]:
        return (
            f"Taken together, as a set, the pictures were not shown to have been used ({p_value}; "
            f"below {found['alpha']:g} would count)."
        )
    words = f"Taken together the pictures are shown to have been used ({p_value})"
    if (needed := found["pictures_needed"]) is not None:
        words += (
            f", even where no single one is: about {needed} of them, with as many similar ones that "
            "were certainly not used, are enough for the test (whose attack learned from all "
            "pictures given here)"
        )
    return words + ". An owner can put that forward as evidence; it is not proof."


def epsilon_words(found: EpsilonBound) -> str:
    """What a lower bound on epsilon from coin flips says."""
    record = (
        f"Of {found['canaries']} pictures that a coin put in or out of the training, the attack "
        f"made {found['guesses']} guesses and got {found['correct']} right."
    )
    sure = f"{100 * found['confidence']:g} %"
    if found["epsilon"] <= 0:
        return (
            f"{record} That is too little to show an epsilon above 0 (at {sure} confidence). It is "
            "no promise of privacy: few pictures can only show a large epsilon."
        )
    factor = count_words(math.exp(min(found["epsilon"], 50)))
    return (
        f"A lower bound on epsilon, the measure of differential privacy: at least "
        f"{found['epsilon']:.2f} (δ = {found['delta']:g}, {sure} confidence). In words: seeing this "
        f"file can change the odds that a picture was used by a factor of {factor} or more; at "
        f"epsilon 0 the file would say nothing of any single picture. {record}"
    )


def skipped_words(skipped: Mapping[str, str]) -> list[str]:
    """Attacks that were not run, grouped by the reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in groups.items()]


def p_words(value: float) -> str:
    """`p = 0.032`, or `p < 0.0001`."""
    return f"p {p_number(value)}" if value < 1e-4 else f"p = {p_number(value)}"


def p_number(value: float) -> str:
    """The same without the p, for tables."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def count_words(value: float) -> str:
    """A number for reading: two digits that count, thousands apart."""
    if value < 10:
        return f"{value:.2g}"
    size = 10 ** max(0, math.floor(math.log10(value)) - 1)
    rounded = round(value) if value < 1000 else round(value / size) * size
    return f"{rounded:,}"


def auc_words(value: float | None) -> str:
    return "not run" if value is None else f"{value:.2f}"


def _unchecked(attack: Attack) -> list[str]:
    controls = attack["controls"]
    names = [
        words
        for ok, words in (
            (controls["base_model_ok"], "base model"),
            (controls["blind_ok"], "blind classifier"),
        )
        if ok is None
    ]
    return [f"Not checked against: {', '.join(names)}."] if names else []
