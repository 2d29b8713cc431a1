"""Every option of a command says what it is, fields of dataclasses too."""

from __future__ import annotations

import pytest

from diffward.commands.main import main


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["zoo", "build"], "saves of each LoRA, at log-spaced steps"),
        (["inverter", "train"], "the fine-tuning step is an input, left out half the time"),
        (["train"], "stop when the members' AUC passes this"),
    ],
)
def test_help_shows_what_stands_under_a_field(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert not stop.value.code
    assert words in " ".join(capsys.readouterr().out.split())
