"""What figures mean in words, the advice that follows from them, and what the terminal shows."""

from __future__ import annotations

import pytest

from diffward.report.advice import membership_advice, training_methods
from diffward.report.build import build_report
from diffward.report.evidence import (
    count_words,
    epsilon_words,
    p_words,
    passes_words,
    skipped_words,
    together_words,
)
from diffward.report.terminal import show_report

from .audit_examples import (
    EPSILON,
    EXPOSURE,
    LEAKS,
    SUBJECT,
    TOGETHER,
    audit,
    audit_of_twenty,
    membership_of,
)


def membership_of_report(found, rank=8):
    report = build_report({**SUBJECT, "rank": rank}, [], found)
    return next(q for q in report["questions"] if q["id"] == "membership")


@pytest.mark.parametrize(
    ("passes", "words"),
    [(4.0, "ten can be enough"), (25.0, "the more often"), (120.0, "so many usually")],
)
def test_passes(passes, words):
    said = passes_words({"passes": passes, "steps": 10, "source": "header"})
    assert f"about {passes:.0f} times, says the file's header" in said and words in said


def test_taken_together():
    assert "about 9 of them" in together_words(TOGETHER)
    assert "not proof" in together_words(TOGETHER)
    assert "9" not in together_words({**TOGETHER, "pictures_needed": None, "p_value": 0.001})
    assert "not shown to have been used" in together_words({**TOGETHER, "p_value": 0.02})


def test_epsilon():
    said = epsilon_words(EPSILON)
    assert "at least 2.13 (δ = 1e-05, 95 % confidence)" in said and "factor of 8.4" in said
    assert "60 guesses and got 57 right" in said
    said = epsilon_words({**EPSILON, "epsilon": 0.0})
    assert "at least" not in said and "no promise of privacy" in said
    assert epsilon_words({**EPSILON, "epsilon": 900.0})


def test_numbers():
    assert [count_words(v) for v in (2.5, 8.37, 12.0, 120.4, 1480, 22026.5)] == [
        "2.5", "8.4", "12", "120", "1,500", "22,000",
    ]  # fmt: skip
    assert p_words(3e-6) == "p < 0.0001" and p_words(0.0321) == "p = 0.032"
    assert skipped_words({"a": "x", "b": "y", "c": "x"}) == ["a, c: x", "b: y"]


def test_unknown_captions_are_said():
    found = {**audit()[0], "captions": "unknown"}
    question = membership_of_report(found)
    assert any("not given the captions" in line for line in question["evidence"])
    assert "caption" not in question["statement"]
    assert "the picture's caption can tell" in membership_of_report(audit()[0])["statement"]


def test_what_the_best_attack_needs_is_said():
    found = audit(shift=2.5)[0]
    found["attacks"]["calibrated"]["access"] = "white box and known members"
    attacks = dict(found["attacks"])
    best = membership_of_report(found)
    plain = membership_of_report(membership_of({"loss": attacks["loss"]}))
    needy = membership_of_report(membership_of({"calibrated": attacks["calibrated"]}))
    assert "and knows some of the training pictures already, can tell" in needy["statement"]
    assert "already" not in plain["statement"]
    said = " ".join(best["evidence"])
    assert ("already" in best["statement"]) == ("Someone without that still tells" in said)


def test_advice_follows_from_the_figures():
    found = audit_of_twenty()[0]
    advice = membership_advice(found, "clid", "critical", 64, ["plain", "dp", "mp"], few=False)
    text = "\n".join(advice)
    assert "each picture about 120 times. Try a tenth of that, about 12" in text
    assert "it is 64" in text and "if 48 were all" in text
    assert "diffward train --method dp" in text and "Do not publish the captions" in text
    assert "Do not share" in advice[0]


def test_advice_leaves_out_what_does_not_fit():
    found = {**audit(n=60)[0], "exposure": {**EXPOSURE, "passes": 4.0}}
    text = "\n".join(membership_advice(found, "loss", "low", [4, 8], ["plain"], few=False))
    assert "stopped early, after about 4 passes" in text and "tenth" not in text
    for words in ("rank", "were all", "--method", "captions", "Do not share"):
        assert words not in text
    unknown = membership_advice(audit(n=60)[0], "loss", "low", None, [], few=True)
    assert "a tenth of the passes" in unknown[0] and "Hold out more" in unknown[-1]


def test_no_method_is_named_that_there_is_not():
    text = "\n".join(membership_of_report(audit()[0], rank=[8, 32])["advice"])
    assert "it is 32" in text
    named = [m for m in ("dp", "smp", "mp") if f"--method {m}" in text]
    assert set(named) <= set(training_methods())


def test_terminal(capsys):
    show_report(build_report(SUBJECT, LEAKS, audit_of_twenty()[0]))
    lines = capsys.readouterr().out.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("  attack")))
    assert "clid_mc" in lines[table + 1] and "p, all 20 attacks" in lines[table]
    assert lines[table + 7] == "  14 more attacks: report.html"
    assert "  2 attacks not run: lira, rmia: needs shadow LoRAs (--shadows)" in lines
    assert "  controls: base model 0.58 at the farthest (spread), blind 0.47: at chance" in lines
    assert any("epsilon at least 2.13" in line for line in lines)


def test_terminal_says_first_that_a_control_failed(capsys):
    found = audit_of_twenty(blind_auc=0.9, blind_ok=False)[0]
    show_report(build_report(SUBJECT, LEAKS, found))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("No claim about membership can be made: a control failed.")
    assert lines[1].startswith("  membership: no claim.")
    off = next(i for i, line in enumerate(lines) if "OFF CHANCE" in line)
    assert off < next(i for i, line in enumerate(lines) if "clid" in line)
    assert "epsilon" not in "\n".join(lines)


def test_terminal_without_pictures_or_with_one_attack(capsys):
    show_report(build_report(SUBJECT, LEAKS))
    assert "attack" not in capsys.readouterr().out
    show_report(
        build_report(
            SUBJECT, [], audit(names=("loss",), base_model_auc=None, base_model_ok=None)[0]
        )
    )
    out = capsys.readouterr().out
    assert (
        "controls: base model not run, blind 0.47: at chance" in out
        and "attacks" not in out.split("loss")[0]
    )
