"""The longer documents: their commands are accepted, their numbers are those that were measured."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlparse

import pytest
from node_texts import ROOT

DOCS = ROOT / "docs"
DOCUMENTS = sorted(DOCS.glob("*.md"))


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def commands(document: Path) -> list[str]:
    text = "".join(re.findall(r"^```sh\n(.*?)^```$", read(document), re.MULTILINE | re.DOTALL))
    return [line for line in text.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if not urlparse(link).scheme:
            assert (document.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_accepted_and_mean_the_same_in_every_shell(document: Path) -> None:
    from easyref_core.cli import _parsed
    from workshop.demo.__main__ import _parser

    parsers = {"easyref": _parsed, "workshop.demo": _parser().parse_args}
    accepted = 0
    lines = commands(document)
    for line in lines:
        plain = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
        assert not re.search(r"[\[\]*?~]", plain), line
        words = shlex.split(line, comments=True)
        for program in parsers.keys() & set(words):
            start = words.index(program) + 1
            parsers[program]([word for word in words[start:] if word != "..."])
            accepted += 1
    assert accepted


def test_the_tables_of_the_demo_say_what_was_measured() -> None:
    from workshop.pages.make_tables import tables

    check = json.loads((DOCS / "demo_check.json").read_text(encoding="utf-8"))
    assert tables(check) in read(DOCS / "demo.md")
