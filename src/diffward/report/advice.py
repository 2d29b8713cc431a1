"""What to do about a membership leak, as it follows from the figures. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from diffward.report.evidence import FEW_PASSES, count_words
from diffward.report.schema import LEVELS, Level, Membership

LARGE_RANK = 32
FEW_MEMBERS = 50
PROTECTING = ("dp", "smp", "mp")  # methods that protect members, the one with a guarantee first


def membership_advice(
    found: Membership,
    best: str,
    level: Level,
    lora_rank: int | Sequence[int] | None,
    methods: Sequence[str],
    *,
    few: bool,
) -> list[str]:
    """Most useful first.

    Args:
        best: name of the attack on which the level rests.
        lora_rank: of the file; of several the largest counts.
        methods: of training that there are: only those are named.
        few: so few pictures that the intervals are wide.
    """
    advice = []
    if LEVELS.index(level) >= LEVELS.index("high"):
        advice.append(
            "Do not share this file where it must stay secret which pictures were used, for "
            "instance where they show people who did not agree."
        )
    if level == "none_shown":
        advice.append(
            "This is no guarantee: other attacks, or more effort, may find more. Audit again "
            "whenever you train longer or on fewer pictures."
        )
    else:
        advice.append(_stop_earlier(found))
        advice += _smaller(lora_rank) + _more_pictures(found["attacks"][best]["n_members"])
        advice.append(_protect(methods))
        access = found["attacks"][best]["access"].lower()
        by_caption = "clid" in best.lower() or "with the captions" in access
        if by_caption and found["captions"] == "known":
            advice.append(
                "Do not publish the captions: the strongest attack rests on them, and someone who "
                "must guess them has less to go on."
            )
        advice.append("Audit the new file before you share it.")
    if few:
        advice.append("Hold out more pictures, 100 or more if you can, for a sharper answer.")
    return advice


def training_methods() -> list[str]:
    """Names of the methods of training that there are."""
    from diffward.finetune import METHODS

    return METHODS.names()


def _stop_earlier(found: Membership) -> str:
    exposure = found["exposure"]
    if exposure is None:
        return (
            "Stop earlier: train again with a tenth of the passes over each picture, or with a "
            "lower learning rate. Long training on few pictures is what makes a model remember them."
        )
    passes = exposure["passes"]
    if passes < FEW_PASSES:
        return (
            f"Lower the learning rate: training stopped early, after about {count_words(passes)} "
            "passes over each picture, and remembered them all the same."
        )
    return (
        f"Stop earlier: training saw each picture about {count_words(passes)} times. Try a tenth "
        f"of that, about {count_words(max(1, passes / 10))}, or a lower learning rate."
    )


def _smaller(lora_rank: int | Sequence[int] | None) -> list[str]:
    ranks = [lora_rank] if isinstance(lora_rank, int) else list(lora_rank or ())
    largest = max(ranks, default=0)
    if largest < LARGE_RANK:
        return []
    return [f"Lower the rank: it is {largest}. A rank of 4 to 16 has less room to remember."]


def _more_pictures(members: int) -> list[str]:
    if members >= FEW_MEMBERS:
        return []
    return [
        f"Train on more pictures, if {members} were all: the fewer there are, the more each one "
        "leaves behind."
    ]


def _protect(methods: Sequence[str]) -> str:
    known = next((name for name in PROTECTING if name in methods), None)
    options = " --dp.epsilon 8" if known == "dp" else ""
    how = (
        f": diffward train --method {known}{options}" if known else ", such as differential privacy"
    )
    return f"Or train with a method that protects members{how}."
