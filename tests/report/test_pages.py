"""report.json, report.html, scores.csv and index.html: same facts, hostile input, no network."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from diffward.errors import InputError
from diffward.report.build import build_report, plain, write_report
from diffward.report.index import write_index
from diffward.report.schema import validate_report

from .audit_examples import (
    LEAKS,
    PNG,
    PROVENANCE,
    SUBJECT,
    TWENTY,
    audit,
    audit_of_twenty,
)

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "img", "br", "line", "circle", "rect", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text: str, scripts: int) -> None:
    """Well-formed, nothing from outside, no script but ours, headings and alternatives in place."""
    outside = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", outside)
    tags = Tags(text).tags
    assert [tag for tag, _ in tags].count("script") == scripts
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert all("alt" in attrs for tag, attrs in tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in tags if tag == "svg")
    assert [tag for tag, _ in tags].count("h1") == 1
    assert text.lstrip().lower().startswith("<!doctype html>") and "<html lang" in text


@pytest.fixture
def written(tmp_path):
    found, per_image = audit()
    report = build_report(SUBJECT, LEAKS, found, PROVENANCE)
    html, data = write_report(report, per_image, tmp_path)
    return report, html.read_text(), json.loads(data.read_text()), tmp_path


def test_json_keeps_the_schema(written):
    report, _, data, _ = written
    assert data == report and validate_report(data) == []
    assert data["schema"] == "diffward.report/1" and "extra" not in data["subject"]
    assert data["membership"]["per_image"] == "scores.csv"


def test_page_holds_the_facts_of_the_json(written):
    _, page, data, _ = written
    check_page(page, scripts=1)
    text = re.sub(r"\s+", " ", page)
    for name, attack in data["membership"]["attacks"].items():
        assert name in text and f"{attack['auc']:.2f}" in text
        assert f"[{attack['auc_ci95'][0]:.2f}, {attack['auc_ci95'][1]:.2f}]" in text
        assert f"{attack['tpr_at_fpr']['0.05']:.2f}" in text
    assert "anna.safetensors" in text and "3f3f3f3f" in text and "1,234,567" in text
    assert data["overall"]["headline"].split(".")[0] in text
    assert "ss_tag_frequency" in text and "9 training tags" in text
    assert "needs at least 1000 non-members" in text
    # Every picture once as a row (sorted by name), and the twelve most exposed.
    assert text.count("portrait_") == 2 * 80 + 12


def test_scores_csv(written):
    _, _, data, out = written
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert list(rows[0]) == ["file", "sha256", "member", "loss", "calibrated", "p_value"]
    assert len(rows) == 80 and sum(int(row["member"]) for row in rows) == 40
    best = np.array([float(row[data["membership"]["best"]]) for row in rows])
    others = best[[row["member"] == "0" for row in rows]]
    assert float(rows[0]["p_value"]) == pytest.approx(
        (1 + (others >= best[0]).sum()) / 41, rel=1e-4
    )


def test_reversed_leak_ranks_low_scores_first(tmp_path):
    found, per_image = audit(shift=-3.0, names=("loss",))
    write_report(build_report(SUBJECT, [], found), per_image, tmp_path)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    lowest = min(rows, key=lambda row: float(row["loss"]))
    assert float(lowest["p_value"]) == pytest.approx(1 / 41, rel=1e-4)


def test_hostile_words_stay_words(tmp_path):
    found, per_image = audit(names=(EVIL, "loss"))
    found["attacks"][EVIL]["access"] = EVIL
    found["skipped"] = {EVIL + "2": EVIL}
    found["exposure"] = {"passes": 3.0, "steps": 9, "source": EVIL}
    per_image["file"][0] = EVIL
    per_image["thumbnails"][1] = "javascript:alert(1)"
    per_image["thumbnails"][2] = "data:image/svg+xml;base64,AAAA"
    subject = {**SUBJECT, "path": f"a/{EVIL}", "format": EVIL, "base_family": EVIL}
    leaks = [{"key": EVIL, "reveals": EVIL, "category": EVIL}]
    report = build_report(subject, leaks, found, {"device": EVIL, "config": {EVIL: EVIL}})
    html, _ = write_report(report, per_image, tmp_path)
    page = html.read_text()
    check_page(page, scripts=1)
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "javascript:" not in page and "svg+xml" not in page
    write_index(
        EVIL,
        [EVIL],
        [{"name": EVIL, "report": report, "report_path": "a b.html"}],
        tmp_path / "i.html",
    )
    check_page((tmp_path / "i.html").read_text(), scripts=0)


def test_policy_allows_our_script_only(written):
    _, page, _, _ = written
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"script-src &#39;sha256-{digest}&#39;" in page or f"script-src 'sha256-{digest}'" in page
    )
    assert "default-src 'none'" in page


def test_spreadsheet_formulas_are_defused(tmp_path):
    found, per_image = audit()
    per_image["file"][0] = "=HYPERLINK(1)"
    write_report(build_report(SUBJECT, [], found), per_image, tmp_path)
    assert "\n'=HYPERLINK(1)," in (tmp_path / "scores.csv").read_text()


def test_report_without_pictures(tmp_path):
    report = build_report(SUBJECT, LEAKS, None, {})
    assert validate_report(report) == [] and report["membership"] is None
    html, _ = write_report(report, None, tmp_path)
    check_page(html.read_text(), scripts=1)
    assert "Not asked" in html.read_text() and not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize("n", [2, 5, 700])
def test_few_and_many_pictures(tmp_path, n):
    found, per_image = audit(n=n, blind_auc=None, blind_ok=None)
    report = build_report(SUBJECT, [], found, PROVENANCE)
    html, _ = write_report(report, per_image, tmp_path)
    check_page(html.read_text(), scripts=1)
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html.read_text(), re.S)).lower()
    assert len(html.read_text()) < 600_000
    assert ("intervals are wide" in html.read_text()) == (n < 20)


def test_refused_report_shows_the_failed_control(tmp_path):
    found, per_image = audit(blind_auc=0.9, blind_ok=False, blind_reason="off chance: AUC 0.9")
    report = build_report(SUBJECT, [], found)
    assert validate_report(report) == []
    html, _ = write_report(report, per_image, tmp_path)
    page = html.read_text()
    assert "✗ 0.90" in page and "No claim" in page
    headline = report["overall"]["headline"]
    assert headline.startswith("No claim about membership can be made: a control failed.")
    # Nothing but the name of the file stands before it, and no picture is called exposed.
    body = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[page.index("<h1>") :])).strip()
    assert body.startswith(f"anna.safetensors No claim about part of it {headline}".split(".")[0])
    assert "most exposed pictures" not in page and "For the record only" in page


def test_equal_scores_are_drawn(tmp_path):
    found, per_image = audit(names=("loss",))
    per_image["scores"]["loss"] = [1.0] * 80
    write_report(build_report(SUBJECT, [], found), per_image, tmp_path)


def test_ill_fitting_scores_are_named(tmp_path):
    found, per_image = audit()
    report = build_report(SUBJECT, [], found)
    with pytest.raises(InputError, match="79 entries of loss for 80"):
        scores = {**per_image["scores"], "loss": per_image["scores"]["loss"][1:]}
        write_report(report, {**per_image, "scores": scores}, tmp_path)
    with pytest.raises(InputError, match="needs the scores"):
        write_report(report, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_validator_finds_what_is_wrong(written):
    report = written[0]
    assert validate_report({}) != []
    for change in (
        {"schema": "other"},
        {"overall": {**report["overall"], "level": "safe"}},
        {"questions": [{**report["questions"][0], "id": "colour"}]},
    ):
        assert len(validate_report({**report, **change})) == 1
    bound = {"attack": "loss", "epsilon": 1.0, "delta": 0.0, "confidence": 0.95}
    for change in (
        {"best": "none"},
        {"skipped": {"loss": "it was run"}},
        {"captions": "perhaps"},
        {"evaluations_per_image": {"made": 1.0}},
        {"exposure": {"passes": -1.0, "steps": 1, "source": "header"}},
        {"dataset_inference": {"p_value": 1.2, "pictures_needed": None, "alpha": 0.01}},
        {"dataset_inference": {"p_value": 0.2, "alpha": 0.01}},
        {"epsilon": {**bound, "guesses": 5, "correct": 6, "canaries": 10}},
        {"epsilon": {**bound, "epsilon": -1.0, "guesses": 5, "correct": 4, "canaries": 10}},
        {"attacks": _changed(report, p_holm=0.0, p_value=0.5)},
        {"attacks": _changed(report, auc_ci95=[0.99, 1.0], auc=0.5)},
    ):
        assert (
            len(validate_report({**report, "membership": {**report["membership"], **change}})) == 1
        )


def _changed(report, **figures):
    attacks = report["membership"]["attacks"]
    return {**attacks, "loss": {**attacks["loss"], **figures}}


def test_twenty_attacks(tmp_path):
    found, per_image = audit_of_twenty()
    report = build_report(SUBJECT, LEAKS, found, PROVENANCE)
    assert validate_report(report) == []
    html, _ = write_report(report, per_image, tmp_path)
    page = html.read_text()
    check_page(page, scripts=1)
    assert len(page) < 300_000
    # All attacks in the forest and in the table, the best first; five curves; four columns of scores.
    names = re.findall(r'<li[^>]*><span class="label">(\w+)</span>', page)
    assert sorted(names) == sorted(TWENTY) and names[0] == report["membership"]["best"]
    assert re.findall(r'<th scope="row" data-v="(\w+)"', page) == names
    assert page.count("<polyline") == 5 and "The 5 best of 20 attacks" in page
    pictures = page[page.index('aria-label="Scores of each picture"') :]
    assert pictures[: pictures.index("</thead>")].count("<th ") == 3 + 4
    assert len((tmp_path / "scores.csv").read_text().splitlines()[0].split(",")) == 20 + 4
    # Members only, with their pictures.
    exposed = re.search(r'<ol class="exposed">(.*?)</ol>', page, re.S)[1]
    member = dict(zip(per_image["file"], per_image["member"], strict=True))
    shown = re.findall(r"portrait_\d+\.png", exposed)
    assert len(shown) == 12 == exposed.count("<img") and all(member[name] for name in shown)
    for words in (
        "lira, rmia: needs shadow LoRAs (--shadows)",
        "212 times for each picture",
        "it would have been 1,480",
        "≥ 2.13",
        "a factor of 8.4 or more",
        "≈ 120",
        "9 pictures",
        "threshold fixed beforehand",
        f'base model <span class="ok">✓ {0.5 + 0.004 * 19:.2f}</span>',
    ):
        assert words in page, words


def test_a_list_of_exposed_pictures_is_made_of_no_luck(tmp_path):
    found, per_image = audit_of_twenty(share=0.0)
    html, _ = write_report(build_report(SUBJECT, [], found), per_image, tmp_path)
    page = html.read_text()
    assert "most exposed pictures" not in page
    assert "Could be luck" in page and "this order may be luck" in page
    assert "no bound" in page and "not shown" in page


def test_no_attack_could_be_run(tmp_path):
    found, per_image = audit()
    found = {**found, "attacks": {}, "skipped": {"lira": "needs shadow LoRAs (--shadows)"}}
    report = build_report(SUBJECT, [], found)
    assert validate_report(report) == [] and report["membership"] is None
    assert report["overall"]["claim"] == "partial"
    html, _ = write_report(report, {**per_image, "scores": {}}, tmp_path)
    assert "no attack could be run (lira: needs" in html.read_text()
    assert "Not asked" not in html.read_text()


def test_plain_values():
    given = {"a": Path("x"), "b": np.float32(1.5), "c": (1, np.nan), "d": np.arange(2)}
    assert plain(given) == {"a": "x", "b": 1.5, "c": [1, None], "d": [0, 1]}


def test_index(tmp_path):
    cards = []
    for name, shift in (("over-trained", 4.0), ("stopped early", 0.0)):
        report = build_report(SUBJECT, [], audit(shift)[0])
        pictures = [
            {"src": PNG, "alt": "a face", "caption": "anna"},
            {"src": "s/1.png", "alt": "b"},
        ]
        cards.append(
            {
                "name": name,
                "subtitle": "steps",
                "report": report,
                "report_path": f"{name}/report.html",
                "numbers": [("shows the person", "98 %")],
                "images": [{"title": "What it draws", "pictures": pictures}],
            }
        )
    page = write_index("Two LoRAs", ["Why."], cards, tmp_path / "index.html", ["Next."]).read_text()
    check_page(page, scripts=0)
    for words in (
        "over-trained",
        "stopped early",
        "Critical",
        "None shown",
        "98 %",
        "a face",
        "Next.",
    ):
        assert words in page
    assert 'href="over-trained/report.html"' in page and 'src="s/1.png"' in page


@pytest.mark.parametrize("link", ["javascript:alert(1)", "https://x.org/a", "//x.org/a", "/etc/a"])
def test_index_links_stay_inside(tmp_path, link):
    card = {"name": "a", "report": build_report(SUBJECT), "report_path": link}
    with pytest.raises(InputError, match="relative"):
        write_index("t", [], [card], tmp_path / "index.html")
    assert list(tmp_path.iterdir()) == []
