"""The section with pictures drawn from the weights: blurred, beside the owner's, and nothing but embedded bitmaps."""

from __future__ import annotations

import numpy as np

from diffward.report.build import build_report, write_report
from diffward.report.images import thumbnail
from tests.report.audit_examples import SUBJECT, audit


def page(tmp_path, drawn):
    found, per_image = audit(names=("loss",))
    write_report(build_report(SUBJECT, [], found), {**per_image, "drawn": drawn}, tmp_path)
    return (tmp_path / "report.html").read_text(), (tmp_path / "report.json").read_text()


def group(title="From the weights", **pair):
    uri = thumbnail(np.zeros((4, 4, 3), np.uint8))
    return {
        "title": title, "control": False,
        "pairs": [{"drawn": uri, "nearest": uri, "file": "a<b>.png", "closeness": 0.5, **pair}],
    }  # fmt: skip


def test_pictures_are_blurred_until_clicked_and_only_in_the_page(tmp_path):
    html, json = page(tmp_path, [group()])
    assert 'class="reveal"' in html and "filter: blur" in html and "What the weights show" in html
    assert "a&lt;b&gt;.png" in html and "a<b>" not in html
    assert "data:image" not in json


def test_nothing_is_fetched(tmp_path):
    html, _ = page(
        tmp_path, [group(drawn="https://example.org/x.png", nearest="javascript:alert(1)")]
    )
    assert "example.org" not in html and "javascript:" not in html


def test_without_drawn_pictures_there_is_no_section(tmp_path):
    assert "What the weights show" not in page(tmp_path, [])[0]
