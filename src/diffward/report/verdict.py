"""The rules that turn figures into answers. Pure functions: no files, no randomness.

**Membership.** Levels by the sign-free AUC (max(AUC, 1 - AUC)) of the best attack, the one whose
interval starts highest:

    low >= 0.55   medium >= 0.60   high >= 0.75   critical >= 0.90

- No level unless the 95 % interval excludes 0.5. With k attacks tried it must do so at
  1 - 0.05/k (Bonferroni, Newcombe's interval), or trying many would make a leak of luck.
- The estimate gives the level, but at most one step above the one its lower end would give, so
  that five pictures cannot prove what a hundred should.
- A few pictures may be exposed while the average is not (Carlini et al. 2022): a TPR at 1 % or
  5 % FPR whose interval starts above 2, 5 or 10 times the FPR makes it at least low, medium, high.
- A control off chance refuses the claim, whatever the attack says: members and non-members then
  differ by themselves.

**Metadata.** The worst category of header entry: captions or pictures high; folders, paths or names
medium; counts, times, seeds, settings and entries nobody knows low.

The overall level is that of the worst question, never an average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffward.membership.statistics import newcombe_ci, signfree_interval
from diffward.report.schema import LEVELS, Attack, Claim, Leak, Level, Overall, Question

AUC_STEPS: tuple[tuple[float, Level], ...] = (
    (0.90, "critical"),
    (0.75, "high"),
    (0.60, "medium"),
    (0.55, "low"),
)
TPR_STEPS: tuple[tuple[float, Level], ...] = ((10, "high"), (5, "medium"), (2, "low"))
LEAK_LEVELS: dict[str, Level] = {
    "captions": "high",
    "pictures": "high",
    "folders": "medium",
    "paths": "medium",
    "names": "medium",
}
FEW = 20

BUDGET = "none shown by these attacks within this budget"

_HOLDER = "Whoever holds this file, its base model, a picture and the picture's caption"
_MEMBERSHIP_WORDS: dict[Level, str] = {
    "critical": f"{_HOLDER} can tell very reliably whether it was used for training.",
    "high": f"{_HOLDER} can tell reliably whether it was used for training.",
    "medium": f"{_HOLDER} can tell clearly better than by guessing whether it was used for training.",
    "low": f"{_HOLDER} can tell a little better than by guessing whether it was used for training.",
    "none_shown": f"Membership: {BUDGET}. They were not shown to tell training pictures from others "
    "better than guessing.",
}

_HEADLINES: dict[tuple[str, Level], str] = {
    ("membership", "critical"): "This file gives away which pictures it was trained on.",
    ("membership", "high"): "This file largely gives away which pictures it was trained on.",
    ("membership", "medium"): "This file partly gives away which pictures it was trained on.",
    ("membership", "low"): "This file hints at which pictures it was trained on.",
    ("metadata", "high"): "The file's header spells out details of the training data.",
    ("metadata", "medium"): "The file's header names folders, paths or people.",
    ("metadata", "low"): "The file's header tells minor details of the training.",
}


def rank(level: Level | None) -> int:
    """Position of a level from harmless to worst; -1 for no level."""
    return -1 if level is None else LEVELS.index(level)


def metadata_question(leaks: Sequence[Leak]) -> Question:
    """What the header alone gives away."""
    if not leaks:
        return _question(
            "metadata",
            "none_shown",
            "Header: nothing found that tells of the training data.",
            statistic="entries",
            value=0.0,
        )
    level = max((LEAK_LEVELS.get(leak.get("category", ""), "low") for leak in leaks), key=rank)
    count = f"{len(leaks)} {'entry' if len(leaks) == 1 else 'entries'}"
    kinds = sorted({leak.get("category") or "unknown" for leak in leaks})
    return _question(
        "metadata",
        level,
        f"The file's header carries {count} that anyone can read without tools "
        f"({', '.join(kinds)}).",
        statistic="entries",
        value=float(len(leaks)),
        evidence=[f"{leak['key']}: {leak['reveals']}" for leak in leaks],
        advice=["Remove these entries before sharing: diffward scrub FILE --out CLEAN.safetensors"],
    )


def best_attack(attacks: Mapping[str, Attack]) -> str:
    """The attack whose sign-free interval starts highest, then the one with the highest AUC."""
    return max(
        attacks,
        key=lambda name: (_lower(attacks[name], len(attacks)), attacks[name]["auc_signfree"]),
    )


def membership_level(attack: Attack, attacks_tried: int = 1) -> Level:
    """The level of one attack's figures by the rules above; controls are not looked at."""
    lower = _lower(attack, attacks_tried)
    level: Level = "none_shown"
    if lower > 0.5:
        estimate, floor = _step(attack["auc_signfree"], AUC_STEPS), _step(lower, AUC_STEPS)
        level = LEVELS[min(rank(estimate), rank(floor) + 1)]
    for fpr in ("0.01", "0.05"):
        interval = attack["tpr_at_fpr_ci95"].get(fpr)
        if interval is not None:
            level = max(level, _step(interval[0] / float(fpr), TPR_STEPS), key=rank)
    return level


def failed_controls(attacks: Mapping[str, Attack]) -> list[str]:
    """One sentence for each control that is off chance."""
    found = []
    if blind := next((a for a in attacks.values() if a["controls"]["blind_ok"] is False), None):
        found.append(
            "A classifier that never saw the model tells the two groups of pictures apart "
            f"(AUC {_number(blind['controls']['blind_auc'])}; it should be near 0.5)."
        )
    for name, attack in attacks.items():
        if attack["controls"]["base_model_ok"] is False:
            found.append(
                f"The attack {name!r} tells them apart on the base model alone, which was never "
                f"trained on them (AUC {_number(attack['controls']['base_model_auc'])}; it should "
                "be near 0.5)."
            )
    return found


def membership_question(attacks: Mapping[str, Attack]) -> Question:
    """Can someone tell which pictures the LoRA was trained on?"""
    name = best_attack(attacks)
    best = attacks[name]
    level = membership_level(best, len(attacks))
    interval = best["auc_signfree_ci95"]
    few = min(best["n_members"], best["n_non_members"]) < FEW
    failed = failed_controls(attacks)
    evidence = [_in_hundred(name, best)]
    if failed:
        evidence[0] = f"For the record only, it proves nothing here: {evidence[0]}"
    if best["auc"] < 0.5 and level != "none_shown" and not failed:
        evidence.append(
            f"The AUC lies below one half ({best['auc']:.2f}): training pictures stand out by scoring "
            "lower than others. That gives them away just as well, so it counts as a leak."
        )
    if few:
        evidence.append(
            f"Only {best['n_members']} training pictures and {best['n_non_members']} others were "
            "compared. With a handful of pictures the intervals are wide: read the range, not the "
            "number."
        )
    evidence += _unchecked(best)
    if failed:
        statement = (
            f"No claim about membership can be made. {' '.join(failed)} The pictures differ by "
            "themselves, so the attacks' figures say nothing about this file."
        )
        advice = [
            "Take members and non-members at random from one source, saved and captioned the same "
            "way, and run the audit again."
        ]
        return _question(
            "membership", None, statement, "refused", *_figures(best), evidence, advice
        )
    statement = _MEMBERSHIP_WORDS[level]
    if level == "none_shown" and interval[1] >= 0.6:
        statement += (
            f" But with this many pictures a leak up to AUC {interval[1]:.2f} would not have been "
            "noticed."
        )
    advice = _membership_advice(level, few)
    return _question("membership", level, statement, "made", *_figures(best), evidence, advice)


def overall(questions: Sequence[Question]) -> Overall:
    """The worst question. A refused question makes the whole "partial", or "refused" if all are."""
    made = [question for question in questions if question["level"] is not None]
    refused = [question for question in questions if question["claim"] == "refused"]
    if not made:
        return {"level": None, "claim": "refused", "headline": "No claim can be made."}
    # Of equals the one about pictures is named first: a header can be scrubbed in a second.
    worst = max(made, key=lambda question: (rank(question["level"]), question["id"] != "metadata"))
    level = worst["level"]
    assert level is not None
    if level == "none_shown":
        headline = f"Leaks: {BUDGET}."
    else:
        headline = _HEADLINES.get((worst["id"], level), worst["statement"])
        header = next((q for q in made if q["id"] == "metadata"), worst)
        if header is not worst and rank(header["level"]) > 0:
            headline += " Its header tells of the training data, too."
    if refused:
        names = ", ".join(question["id"] for question in refused)
        headline = f"No claim about {names} can be made. " + (
            "Nothing else was found." if level == "none_shown" else headline
        )
    return {"level": level, "claim": "partial" if refused else "made", "headline": headline}


def _question(
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


def _figures(attack: Attack) -> tuple[str, float, list[float], str]:
    controls = attack["controls"]
    control = (
        f"base model AUC {_number(controls['base_model_auc'])}, "
        f"blind classifier AUC {_number(controls['blind_auc'])}"
    )
    return "auc_signfree", attack["auc_signfree"], list(attack["auc_signfree_ci95"]), control


def _step(value: float, steps: tuple[tuple[float, Level], ...]) -> Level:
    return next((level for bound, level in steps if value >= bound), "none_shown")


def _lower(attack: Attack, tried: int) -> float:
    """Lower end of the sign-free interval, widened for the number of attacks tried."""
    low = attack["auc_signfree_ci95"][0]
    if tried > 1:
        wide = newcombe_ci(
            attack["auc"], attack["n_members"], attack["n_non_members"], 1 - 0.05 / tried
        )
        low = min(low, signfree_interval(wide)[0])
    return low


def _in_hundred(name: str, attack: Attack) -> str:
    low, high = (round(100 * end) for end in attack["auc_signfree_ci95"])
    return (
        f"Shown one training picture and one other, the best attack ({name}) tells which is which "
        f"{round(100 * attack['auc_signfree'])} times in 100; guessing gives 50. "
        f"The true figure is likely between {low} and {high} (95 % interval)."
    )


def _unchecked(attack: Attack) -> list[str]:
    names = [
        words
        for key, words in (("base_model_ok", "base model"), ("blind_ok", "blind classifier"))
        if attack["controls"][key] is None  # type: ignore[literal-required]
    ]
    return [f"Not checked against: {', '.join(names)}."] if names else []


def _membership_advice(level: Level, few: bool) -> list[str]:
    advice = []
    if rank(level) >= rank("high"):
        advice.append(
            "Do not share this file where it must stay secret which pictures were used, for "
            "instance where they show people who did not agree."
        )
    if rank(level) >= rank("low"):
        advice.append(
            "Train again with fewer steps, a lower rank or more pictures, and audit the result: "
            "long training on few pictures is what makes a LoRA remember them."
        )
    else:
        advice.append(
            "This is no guarantee: other attacks, or more effort, may find more. Audit again "
            "whenever you train longer or on fewer pictures."
        )
    if few:
        advice.append("Hold out more pictures, 100 or more if you can, for a sharper answer.")
    return advice


def _number(value: Any) -> str:
    return "not run" if value is None else f"{value:.2f}"
