"""The verdict's rules, one table row each."""

from __future__ import annotations

from typing import Any

import pytest

from diffward.membership.statistics import signfree_interval
from diffward.report.verdict import (
    best_attack,
    membership_level,
    membership_question,
    metadata_question,
    overall,
)


def attack(auc: float, low: float, high: float, n: int = 200, **controls: Any) -> Any:
    return {
        "auc": auc,
        "auc_ci95": [low, high],
        "auc_signfree": max(auc, 1 - auc),
        "auc_signfree_ci95": list(signfree_interval((low, high))),
        "tpr_at_fpr": {"0.01": None, "0.05": 0.1, "0.1": 0.2},
        "tpr_at_fpr_ci95": {"0.01": None, "0.05": [0.06, 0.15], "0.1": [0.1, 0.3]},
        "tpr_at_fpr_reason": {"0.01": "needs at least 1000 non-members"},
        "n_members": n,
        "n_non_members": n,
        "access": "weights",
        "queries_per_image": 10,
        "controls": {
            "base_model_auc": 0.51,
            "base_model_ok": True,
            "blind_auc": 0.49,
            "blind_ok": True,
            **controls,
        },
    }


@pytest.mark.parametrize(
    ("auc", "low", "high", "level"),
    [
        (0.50, 0.44, 0.56, "none_shown"),
        (0.70, 0.49, 0.88, "none_shown"),  # the interval holds 0.5
        (0.54, 0.51, 0.57, "none_shown"),  # real but trivial
        (0.56, 0.51, 0.61, "low"),
        (0.65, 0.58, 0.72, "medium"),
        (0.80, 0.74, 0.86, "high"),
        (0.95, 0.91, 0.98, "critical"),
        (0.95, 0.76, 1.00, "critical"),  # one step above its lower end
        (1.00, 0.58, 1.00, "medium"),  # five pictures cannot prove critical
        (0.05, 0.02, 0.09, "critical"),  # sign-free
        (0.35, 0.28, 0.42, "medium"),
    ],
)
def test_membership_levels(auc, low, high, level):
    assert membership_level(attack(auc, low, high)) == level


@pytest.mark.parametrize(
    ("low", "level"), [(0.09, "none_shown"), (0.11, "low"), (0.3, "medium"), (0.6, "high")]
)
def test_a_few_exposed_pictures_count(low, level):
    entry = attack(0.52, 0.47, 0.57)
    entry["tpr_at_fpr_ci95"]["0.05"] = [low, 0.9]
    assert membership_level(entry) == level


def test_many_attacks_must_be_surer():
    entry = attack(0.565, 0.501, 0.63, n=170)
    assert membership_level(entry, 1) == "low"
    assert membership_level(entry, 8) == "none_shown"


def test_best_attack_is_the_one_that_starts_highest():
    attacks = {"wide": attack(0.9, 0.52, 1.0, n=8), "sure": attack(0.8, 0.75, 0.85)}
    assert best_attack(attacks) == "sure"


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({"blind_ok": False, "blind_auc": 0.8}, "never saw the model"),
        ({"base_model_ok": False, "base_model_auc": 0.7}, "base model alone"),
    ],
)
def test_a_failed_control_refuses_and_says_so_first(controls, words):
    question = membership_question({"loss": attack(0.99, 0.97, 1.0, **controls)})
    assert question["claim"] == "refused" and question["level"] is None
    assert question["statement"].startswith("No claim about membership can be made.")
    assert words in question["statement"] and "random" in question["advice"][0]
    assert question["evidence"][0].startswith("For the record only")
    whole = overall([metadata_question([]), question])
    assert whole["claim"] == "partial"
    assert whole["headline"].startswith("No claim about membership")
    assert overall([question])["level"] is None


def test_controls_not_run_are_named():
    question = membership_question({"loss": attack(0.8, 0.7, 0.9, blind_ok=None, blind_auc=None)})
    assert question["claim"] == "made"
    assert any("Not checked against: blind classifier" in line for line in question["evidence"])
    assert "not run" in question["control"]


def test_low_auc_is_named_as_a_leak():
    question = membership_question({"loss": attack(0.1, 0.05, 0.15)})
    assert question["level"] == "critical" and question["value"] == 0.9
    assert any("below one half" in line for line in question["evidence"])


def test_a_handful_of_pictures_is_said():
    question = membership_question({"loss": attack(0.7, 0.4, 0.95, n=5)})
    assert question["level"] == "none_shown"
    assert "0.95 would not have been noticed" in question["statement"]
    assert any("intervals are wide" in line for line in question["evidence"])


def test_never_safe():
    question = membership_question({"loss": attack(0.5, 0.45, 0.55)})
    words = " ".join([question["statement"], *question["evidence"], *question["advice"]])
    assert "none shown by these attacks within this budget" in words
    assert "safe" not in words.replace(".safetensors", "").lower()


@pytest.mark.parametrize(
    ("category", "level"),
    [("captions", "high"), ("paths", "medium"), ("counts", "low"), ("unknown", "low")],
)
def test_metadata_levels(category, level):
    question = metadata_question([{"key": "k", "reveals": "r", "category": category}])
    assert question["level"] == level and question["evidence"] == ["k: r"]
    assert "scrub" in question["advice"][0]


def test_metadata_without_category_or_entries():
    assert metadata_question([{"key": "k", "reveals": "r"}])["level"] == "low"
    assert metadata_question([])["level"] == "none_shown"


def test_overall_is_the_worst():
    header = metadata_question([{"key": "k", "reveals": "r", "category": "captions"}])
    pictures = membership_question({"loss": attack(0.5, 0.45, 0.55)})
    assert overall([header, pictures])["level"] == "high"
    assert "header" in overall([header, pictures])["headline"]
    leaking = membership_question({"loss": attack(0.8, 0.76, 0.84)})
    headline = overall([header, leaking])["headline"]
    assert headline.startswith("This file largely gives away") and "header" in headline
    assert "within this budget" in overall([metadata_question([]), pictures])["headline"]
