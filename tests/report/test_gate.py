"""--fail-above: what is understood, and that it fails closed."""

from __future__ import annotations

import pytest

from diffward.errors import InputError
from diffward.report.build import build_report
from diffward.report.gate import Gate, parse_gate

from .audit_examples import LEAKS, SUBJECT, audit, audit_of_twenty, membership_of


def report(shift=2.0, leaks=(), **controls):
    return build_report(SUBJECT, leaks, audit(shift, **controls)[0])


def test_parse():
    assert parse_gate("auc=0.6") == Gate("auc", 0.6)
    assert parse_gate(" TPR@0.05 = 0.2 ") == Gate("tpr@0.05", 0.2)
    assert parse_gate("level=medium") == Gate("level", "medium")


@pytest.mark.parametrize(
    "spec",
    ["", "auc", "auc=", "auc=x", "auc=nan", "auc=1.2", "f1=0.5", "level=awful", "tpr@0.2=0.1"],
)
def test_wrong_specs(spec):
    with pytest.raises(InputError, match="not understood"):
        parse_gate(spec)


@pytest.mark.parametrize(
    ("spec", "shift", "crossed"),
    [
        ("auc=0.6", 2.0, True),
        ("auc=0.6", -2.0, True),  # sign-free
        ("auc=1", 9.0, False),  # strictly above
        ("auc=0.75", 0.0, False),
        ("tpr@0.05=0.2", 3.0, True),
        ("tpr@0.05=0.9", 0.0, False),
        ("level=medium", 4.0, True),
        ("level=critical", 4.0, False),
    ],
)
def test_crossed(spec, shift, crossed):
    assert bool(parse_gate(spec).crossed(report(shift))) is crossed


def test_reason_names_attack_and_figure():
    lines = parse_gate("auc=0.6").crossed(report(2.0))
    assert len(lines) == 2 and "above 0.6" in lines[0]
    assert "calibrated" in lines[0] and "loss" in lines[1]


def test_the_worst_attacks_are_named_and_luck_is_called_so():
    found = audit_of_twenty(share=0.0)[0]
    lines = parse_gate("auc=0.5").crossed(build_report(SUBJECT, [], found))
    assert len(lines) == 4 and lines[-1] == "auc: 17 more attacks are above it"
    assert all("that may be luck (p = 1)" in line for line in lines[:3])
    figures = [float(line.split(" is ")[1].split(",")[0]) for line in lines[:3]]
    assert figures == sorted(figures, reverse=True)
    assert parse_gate("level=none_shown").crossed(build_report(SUBJECT, [], found)) == []


def test_fails_closed():
    assert parse_gate("tpr@0.01=0.5").crossed(report(0.0)) != []  # too few non-members
    assert parse_gate("auc=0.9").crossed(build_report(SUBJECT)) != []  # no pictures
    nothing_run = build_report(SUBJECT, [], membership_of({}, skipped={"lira": "needs shadows"}))
    assert "no attack could be run" in parse_gate("level=critical").crossed(nothing_run)[0]
    refused = report(0.0, blind_ok=False, blind_auc=0.8)
    assert "control failed" in parse_gate("level=critical").crossed(refused)[0]


def test_header_counts_for_the_level():
    assert parse_gate("level=medium").crossed(report(0.0, LEAKS)) == [
        "metadata is high, above medium"
    ]


def test_a_refused_claim_crosses_every_membership_gate():
    attack = {"auc_signfree": 0.51, "tpr_at_fpr": {"0.05": 0.0}}
    report = {
        "membership": {"attacks": {"loss": attack}},
        "questions": [{"id": "membership", "claim": "refused", "level": None}],
    }
    for spec in ("auc=0.9", "tpr@0.05=0.9", "level=critical"):
        assert parse_gate(spec).crossed(report)
