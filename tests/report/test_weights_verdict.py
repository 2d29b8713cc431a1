"""What findings about weights mean, in levels and words: the rules, at their edges."""

from __future__ import annotations

import numpy as np
import pytest

from diffward.inversion.findings import IdentityFinding, SizeFinding, SubjectFinding
from diffward.inversion.prompt import CaptionFit
from diffward.report.schema import validate_report
from diffward.report.verdict import overall
from diffward.report.weights_verdict import (
    copies_question,
    identity_question,
    prompt_question,
    size_question,
    subject_question,
)

ACCURACY = {"victims": 300, "gallery": 1000, "top1": 0.7, "top10": 0.94}


def identity(p_gallery=0.001, p_others=1 / 151, p_shuffled=1 / 200, rank=1, spread=1.0):
    return IdentityFinding(0.8, rank, 1000, 2, p_gallery, p_others, 150, p_shuffled, 199, spread)


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (identity(), "high"),
        (identity(p_others=0.0099), "high"),
        (identity(p_others=0.01), "low"),
        (identity(p_shuffled=0.03), "none_shown"),  # the file's own weights in any order do as well
        (identity(p_gallery=0.024, rank=24), "low"),
        (identity(p_gallery=0.2, rank=200), "none_shown"),
    ],
)
def test_the_worst_null_distribution_decides(finding, level):
    question = identity_question(finding, None, ACCURACY)
    assert question["level"] == level and question["value"] == finding.p_value
    words = " ".join([question["statement"], *question["evidence"]])
    assert "safe" not in words
    assert ("none shown by these attacks" in words) == (level == "none_shown")
    assert bool(question["advice"]) == (level != "none_shown")


def test_without_a_subject_or_with_several_no_identity_is_claimed():
    held, none = SubjectFinding(0.9, 1 / 60, 59), SubjectFinding(0.4, 0.3, 59)
    assert identity_question(identity(), held, ACCURACY)["level"] == "high"
    assert identity_question(identity(), none, ACCURACY)["level"] == "none_shown"
    several = identity_question(identity(spread=9.0), held, ACCURACY)
    assert several["claim"] == "refused" and several["level"] is None


def test_a_rank_that_is_not_the_first_is_no_name():
    words = identity_question(identity(p_gallery=0.006, rank=6), None, ACCURACY)["statement"]
    assert "narrow down" in words and "6 of 1001" in words and "can tell who is" not in words


def test_harmless_files_are_given_a_level_in_one_of_forty_at_most():
    """Of uniform p-values, the largest of three is below 0.025 at most that often."""
    rng = np.random.default_rng(0)
    shared = rng.uniform(size=4000)
    levels = [identity_question(identity(u, u, u), None, ACCURACY)["level"] for u in shared]
    assert np.mean([level != "none_shown" for level in levels]) < 0.03


def test_without_pictures_nothing_is_said_of_who():
    held = subject_question(SubjectFinding(4.0, 1 / 60, 59), ACCURACY)
    assert held["level"] == "low" and "no attributes and no pictures" in held["statement"]
    assert subject_question(SubjectFinding(-1.0, 0.4, 59), ACCURACY)["level"] == "none_shown"
    assert subject_question(None, ACCURACY)["level"] == "none_shown"


@pytest.mark.parametrize(
    ("p_others", "p_words", "level"),
    [
        (0.01, 0.0025, "medium"),
        (0.01, 0.06, "none_shown"),
        (0.03, 0.01, "low"),
        (0.5, 0.0025, "none_shown"),
    ],
)
def test_words_must_fit_this_file_and_no_other(p_others, p_words, level):
    question = prompt_question(CaptionFit("a", 2.0, p_others, p_words), "guess", 3, 8)
    assert question["level"] == level
    assert any("guess" in line for line in question["evidence"])


def test_a_reading_no_better_than_a_constant_is_no_answer():
    assert size_question(SizeFinding(5.0, (1.0, 20.0), -0.02), 4)["level"] == "none_shown"
    told = size_question(SizeFinding(5.0, (3.0, 8.0), 0.4), None)
    assert told["level"] == "low" and told["ci95"] == [3.0, 8.0]


def test_captions_of_held_out_pictures_count_where_there_are_enough():
    fit = CaptionFit("a", 2.0, 0.01, 0.0025, 0.3)
    assert fit.p_value == 0.3 and prompt_question(fit, None, 1, 2)["level"] == "none_shown"


def test_copies_are_what_moved_towards_training_pictures():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, 60), rng.normal(0, 1, 60)
    near, far = base[0] + rng.normal(2, 1, 60), base[1] + rng.normal(0, 1, 60)
    found = copies_question((near, far), base, 64, named=True)
    moved = near - base[0], far - base[1]
    auc = float(np.mean([[a > b for b in moved[1]] for a in moved[0]]))
    assert found["level"] == "high" and found["value"] == pytest.approx(auc)
    none = copies_question((base[0], base[1]), base, 64, named=True)
    assert none["level"] == "none_shown" and none["claim"] == "made"
    refused = copies_question((near, far), (near, far), 64, named=False)
    assert refused["level"] is None and refused["claim"] == "refused"


def test_few_pictures_prove_less_than_many():
    """The same AUC of about 0.8, of eight and of sixty pictures."""
    levels = {}
    for n in (8, 64):
        base = np.zeros(n), np.zeros(n)
        members = np.tile(np.arange(8.0), n // 8) + 2.6
        found = copies_question((members, np.tile(np.arange(8.0), n // 8)), base, 64, named=True)
        assert found["value"] == pytest.approx(0.77, abs=0.02)
        levels[n] = found["level"]
    assert levels == {8: "none_shown", 64: "high"}


def test_headlines_and_schema():
    questions = [
        identity_question(identity(), None, ACCURACY),
        size_question(SizeFinding(5, (1, 20), 0.0), 4),
    ]
    whole = overall(questions)
    assert whole["level"] == "high" and "who is in the training pictures" in whole["headline"]
    report = {
        "schema": "diffward.report/1",
        "subject": {
            "path": "a", "sha256": "b", "format": "peft", "base_family": "sd1", "rank": 8, "modules": 4, "parameters": 9
        },
        "overall": whole, "questions": questions, "leaks": [], "membership": None, "provenance": {},
    }  # fmt: skip
    assert validate_report(report) == []
