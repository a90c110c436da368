"""The documents that people read, and what they quote of the source."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from node_texts import ROOT

README = ROOT / "README.md"
PAGES = ROOT / "web" / "docs"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    """pyproject.toml."""
    toml = pytest.importorskip("tomlkit")  # comfy-cli brings it; tomllib is not in Python 3.10
    return toml.loads(read(ROOT / "pyproject.toml")).unwrap()


def assert_links_lead_somewhere(document: Path, folder: Path | None = None) -> None:
    """Every relative link of a document names a file, seen from `folder` (default: its own)."""
    for link in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if not urlparse(link).scheme:
            assert ((folder or document.parent) / link.partition("#")[0]).exists(), link


def assert_named_files_exist(document: Path) -> None:
    """Every file of the project that a document names in backticks is there."""
    folders = "tests|docs|web|locales|workflows|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[^`\s]+)`", read(document)):
        assert (ROOT / path).exists(), path


def assert_is_a_message(text: str) -> None:
    """A quoted message is one of the source's; an ellipsis stands for what is filled in."""
    fragments = [re.escape(part.strip()) for part in text.split("…") if part.strip()]
    pattern = re.compile(".*".join(fragments), re.DOTALL)
    assert any(pattern.search(message) for message in messages())


@cache
def messages() -> tuple[str, ...]:
    """Every piece of text in the source, with an ellipsis for what is filled in."""
    texts = []
    for folder in ("easyref_core", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(read(path))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(re.sub(r"%[ds]", "…", node.value))
    return tuple(texts)
