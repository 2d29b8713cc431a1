"""Every command that the README and the docs show must parse, and name a command that exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from diffward.commands.cli import parse
from diffward.commands.main import command, find

ROOT = Path(__file__).parents[2]


def shown() -> list[tuple[str, str]]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = line.split(" #")[0].strip()
                if text.startswith("diffward "):
                    found.append((page.name, text.replace("[", "").replace("]", "")))
    return found


@pytest.mark.parametrize(("page", "line"), shown())
def test_commands_of_the_docs_parse(page: str, line: str) -> None:
    name, args = find(shlex.split(line)[1:])
    parse(command(name), f"diffward {name}", args)


def test_docs_show_commands() -> None:
    assert len(shown()) >= 10


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_targets_of_the_readme_exist(target: str) -> None:
    assert f"make {target}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_page_of_guards_names_them_all() -> None:
    from diffward.guard import GUARDS

    page = (ROOT / "docs" / "guard.md").read_text(encoding="utf-8")
    assert [name for name in GUARDS.names() if f"`{name}`" not in page] == []


def test_the_page_of_attacks_names_them_all() -> None:
    from diffward.membership.evaluate import ATTACKS

    page = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    assert [name for name in ATTACKS.names() if f"`{name}`" not in page] == []
