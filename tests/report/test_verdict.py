"""The verdict's rules, one table row each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffward.membership.statistics import (
    auc,
    newcombe_ci,
    signfree_interval,
    tpr_at_fpr,
)
from diffward.report.verdict import (
    best_attack,
    least_visible,
    membership_level,
    membership_question,
    metadata_question,
    not_run_question,
    overall,
    ranked_attacks,
    tail_level,
    worst_base_control,
)

from .audit_examples import CONTROLS, membership_of


def attack(
    auc: float, low: float, high: float, n: int = 200, p_holm: float = 1e-3, **controls: Any
) -> Any:
    return {
        "auc": auc,
        "auc_ci95": [low, high],
        "auc_signfree": max(auc, 1 - auc),
        "auc_signfree_ci95": list(signfree_interval((low, high))),
        "p_value": p_holm / 20,
        "p_holm": p_holm,
        "inflation": 1.0,
        "tpr_at_fpr": {"0.01": None, "0.05": 0.1, "0.1": 0.2},
        "tpr_at_fpr_ci95": {"0.01": None, "0.05": [0.06, 0.15], "0.1": [0.1, 0.3]},
        "tpr_at_fpr_reason": {"0.01": "needs at least 1000 non-members"},
        "n_members": n,
        "n_non_members": n,
        "access": "grey box",
        "queries_per_image": 10,
        "controls": {**CONTROLS, **controls},
    }


def question(*attacks: Any, **changes: Any) -> Any:
    names = ["loss", *(f"a{i}" for i in range(1, len(attacks)))]
    return membership_question(
        membership_of(dict(zip(names, attacks, strict=True)), **changes)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("auc", "low", "high", "level"),
    [
        (0.50, 0.44, 0.56, "none_shown"),
        (0.70, 0.49, 0.88, "none_shown"),  # the interval holds 0.5
        (0.54, 0.51, 0.57, "none_shown"),  # real but trivial
        (0.58, 0.53, 0.63, "low"),
        (0.65, 0.58, 0.72, "medium"),
        (0.80, 0.74, 0.86, "high"),
        (0.95, 0.91, 0.98, "critical"),
        (0.95, 0.77, 1.00, "critical"),  # one step above its lower end
        (1.00, 0.58, 1.00, "medium"),  # five pictures cannot prove critical
        (0.05, 0.02, 0.09, "critical"),  # sign-free
        (0.35, 0.28, 0.42, "medium"),
    ],
)
def test_membership_levels(auc, low, high, level):
    assert membership_level(attack(auc, low, high)) == level


def test_the_adjusted_p_value_must_be_below_five_in_a_hundred():
    assert membership_level(attack(0.8, 0.74, 0.86, p_holm=0.049)) == "high"
    assert membership_level(attack(0.8, 0.74, 0.86, p_holm=0.05)) == "none_shown"


@pytest.mark.parametrize(
    ("key", "tpr", "n", "tried", "level"),
    [
        ("0.05", 0.10, 200, 1, "none_shown"),
        ("0.05", 0.25, 200, 1, "low"),
        ("0.05", 0.50, 200, 1, "medium"),
        ("0.05", 0.80, 200, 20, "high"),
        ("0.05", 0.17, 200, 1, "none_shown"),  # not certainly twice the FPR
        ("0.05", 8 / 24, 24, 1, "none_shown"),  # a few pictures: luck does that in 1 of 60
        ("0.05", 8 / 24, 24, 20, "none_shown"),
        ("0.05", 16 / 24, 24, 20, "low"),
        ("0.01", 0.04, 1000, 20, "none_shown"),
        ("0.01", 0.07, 1000, 20, "low"),
    ],
)
def test_a_few_exposed_pictures_count(key, tpr, n, tried, level):
    entry = attack(0.52, 0.47, 0.57, n=n)
    entry["tpr_at_fpr"] = {"0.01": None, "0.05": None, "0.1": None, key: tpr}
    assert membership_level(entry, tried) == level
    assert tail_level(entry, tried) == (level, key if level != "none_shown" else None)


def test_cross_fitted_scores_must_be_surer():
    for figures, level in (((0.64, 0.57, 0.71), "low"), ((0.05, 0.02, 0.09), "critical")):
        entry = attack(*figures)
        assert membership_level(entry, 10) == level
    entry = attack(0.64, 0.57, 0.71)
    assert membership_level({**entry, "inflation": 1.8}, 10) == "none_shown"
    entry["tpr_at_fpr"]["0.05"] = 0.25
    assert tail_level(entry, 20)[0] == "low"
    assert tail_level({**entry, "inflation": 2.0}, 20)[0] == "none_shown"


def test_many_attacks_must_be_surer():
    entry = attack(0.58, 0.51, 0.65, n=170)
    assert membership_level(entry, 1) == "low"
    assert membership_level(entry, 8) == "none_shown"


def test_best_attack_is_the_one_that_starts_highest():
    attacks = {"wide": attack(0.9, 0.52, 1.0, n=8), "sure": attack(0.8, 0.75, 0.85)}
    assert best_attack(attacks) == "sure"
    assert ranked_attacks({"chance": attack(0.51, 0.44, 0.58), **attacks}) == [
        "sure", "wide", "chance",
    ]  # fmt: skip


def test_best_attack_may_be_the_one_that_exposes_a_few():
    tail = attack(0.54, 0.49, 0.59)
    tail["tpr_at_fpr"]["0.05"] = 0.5
    assert best_attack({"weak": attack(0.6, 0.56, 0.64), "tail": tail}) == "tail"
    found = question(attack(0.6, 0.56, 0.64), tail)
    assert found["level"] == "medium"
    assert any("5 of 100 other pictures finds 50 of 100" in line for line in found["evidence"])


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({"blind_ok": False, "blind_auc": 0.8}, "never saw the model"),
        ({"base_model_ok": False, "base_model_auc": 0.7}, "base model alone"),
    ],
)
def test_a_failed_control_refuses_and_says_so_first(controls, words):
    rest = {
        "dataset_inference": {"p_value": 0.001, "pictures_needed": 9, "alpha": 0.01},
        "epsilon": {"epsilon": 2.0},
    }
    found = question(attack(0.99, 0.97, 1.0, **controls), attack(0.5, 0.45, 0.55), **rest)
    assert found["claim"] == "refused" and found["level"] is None
    assert found["statement"].startswith("No claim about membership can be made: a control failed.")
    assert words in found["statement"] and "random" in found["advice"][0]
    assert found["evidence"][0].startswith("For the record only")
    assert not any("epsilon" in line or "Taken together" in line for line in found["evidence"])
    whole = overall([metadata_question([]), found])
    assert whole["claim"] == "partial"
    assert whole["headline"].startswith("No claim about membership can be made: a control failed.")
    assert overall([found])["level"] is None and "control failed" in overall([found])["headline"]


def test_of_many_failed_controls_the_farthest_is_named():
    failed = {"base_model_ok": False}
    attacks = {
        "a": attack(0.8, 0.7, 0.9, base_model_auc=0.3, **failed),
        "b": attack(0.8, 0.7, 0.9, base_model_auc=0.75, **failed),
        "c": attack(0.8, 0.7, 0.9, base_model_auc=0.95),  # too few to say
        "d": attack(0.8, 0.7, 0.9, base_model_auc=None, base_model_ok=None),
    }
    assert worst_base_control(attacks) == ("b", 0.75)
    found = membership_question(membership_of(attacks))  # type: ignore[arg-type]
    assert "'b'" in found["statement"] and "So does one other" in found["statement"]
    assert worst_base_control({"d": attacks["d"]}) is None


def test_nothing_run_is_no_claim():
    found = not_run_question({"lira": "needs shadow LoRAs (--shadows)"})
    assert found["claim"] == "refused" and "lira: needs shadow" in found["statement"]
    assert overall([metadata_question([]), found])["claim"] == "partial"


def test_controls_not_run_are_named():
    found = question(attack(0.8, 0.7, 0.9, blind_ok=None, blind_auc=None))
    assert found["claim"] == "made"
    assert any("Not checked against: blind classifier" in line for line in found["evidence"])
    assert "not run" in found["control"]


def test_low_auc_is_named_as_a_leak():
    found = question(attack(0.1, 0.05, 0.15))
    assert found["level"] == "critical" and found["value"] == 0.9
    assert any("below one half" in line for line in found["evidence"])


def test_a_handful_of_pictures_is_said():
    found = question(attack(0.7, 0.4, 0.95, n=5, p_holm=0.4))
    assert found["level"] == "none_shown"
    assert "a leak below AUC 0.89 could go unnoticed" in found["statement"]
    assert any("intervals are wide" in line for line in found["evidence"])
    assert least_visible(attack(0.5, 0.4, 0.6, n=5), 20) == 1.0
    hopeless = question(*[attack(0.7, 0.4, 0.95, n=5, p_holm=1.0)] * 20)
    assert "no leak whatever could have been told from luck" in hopeless["statement"]
    assert least_visible(attack(0.5, 0.4, 0.6, n=1000), 20) < 0.55


def test_a_faint_trace_is_not_called_guessing():
    found = question(attack(0.54, 0.52, 0.56, n=2000))
    assert found["level"] == "none_shown" and "a faint trace" in found["statement"]
    assert "better than guessing, but by very little (AUC 0.54)" in found["statement"]


def test_never_safe():
    found = question(attack(0.5, 0.45, 0.55, p_holm=1.0))
    words = " ".join([found["statement"], *found["evidence"], *found["advice"]])
    assert "none shown by these attacks within this budget" in words
    assert "safe" not in words.replace(".safetensors", "").lower()


@pytest.mark.parametrize(
    ("category", "level"),
    [("captions", "high"), ("paths", "medium"), ("counts", "low"), ("unknown", "low")],
)
def test_metadata_levels(category, level):
    found = metadata_question([{"key": "k", "reveals": "r", "category": category}])
    assert found["level"] == level and found["evidence"] == ["k: r"]
    assert "scrub" in found["advice"][0]


def test_metadata_without_category_or_entries():
    assert metadata_question([{"key": "k", "reveals": "r"}])["level"] == "low"
    assert metadata_question([])["level"] == "none_shown"


def test_overall_is_the_worst():
    header = metadata_question([{"key": "k", "reveals": "r", "category": "captions"}])
    pictures = question(attack(0.5, 0.45, 0.55))
    assert overall([header, pictures])["level"] == "high"
    assert "header" in overall([header, pictures])["headline"]
    leaking = question(attack(0.8, 0.76, 0.84))
    headline = overall([header, leaking])["headline"]
    assert headline.startswith("This file largely gives away") and "header" in headline
    assert "within this budget" in overall([metadata_question([]), pictures])["headline"]


@pytest.mark.parametrize(("n", "shared"), [(24, 0.0), (100, 0.8)])
def test_twenty_attacks_on_a_lora_that_learned_nothing(n, shared):
    """At most 5 of 100 may be said to leak. Without the bootstrap: with it, intervals only widen."""
    from diffward.membership.statistics import holm, membership_p_value

    rng, runs, wrong = np.random.default_rng([n, int(10 * shared)]), 40, 0
    for _ in range(runs):
        attacks = {}
        common = rng.normal(size=2 * n)
        for index in range(20):
            scores = np.sqrt(shared) * common + np.sqrt(1 - shared) * rng.normal(size=2 * n)
            members, others = scores[:n], scores[n:]
            value = auc(members, others)
            entry = attack(value, *newcombe_ci(value, n, n), n=n)
            entry["tpr_at_fpr"] = {"0.05": tpr_at_fpr(members, others, 0.05)}
            entry["p_value"] = membership_p_value(members, others)
            attacks[str(index)] = entry
        adjusted = holm({name: entry["p_value"] for name, entry in attacks.items()})
        attacks = {name: {**entry, "p_holm": adjusted[name]} for name, entry in attacks.items()}
        best = best_attack(attacks)
        wrong += membership_level(attacks[best], len(attacks)) != "none_shown"
    assert wrong <= 0.05 * runs
