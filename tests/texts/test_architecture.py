"""ARCHITECTURE.md names files, classes and functions that exist."""

from __future__ import annotations

import re

from documents import ROOT, read

PARTS = ("easyref_core", "nodes", "workshop", "tests", "benchmarks")
DOCUMENT = ROOT / "ARCHITECTURE.md"
SOURCES = {
    path.relative_to(ROOT).as_posix(): read(path)
    for part in PARTS
    for path in (ROOT / part).rglob("*.py")
}
_DEFINITION = re.compile(r"^ *(?:async )?(?:def|class) (\w+)", re.MULTILINE)
DEFINED = {name for source in SOURCES.values() for name in _DEFINITION.findall(source)}


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"[\w/]+\.py\b", read(DOCUMENT)))
    assert len(named) > 20
    for name in named:
        assert any(f"/{path}".endswith(f"/{name}") for path in SOURCES), name


def test_every_folder_it_names_exists() -> None:
    parts = "|".join((*PARTS, "web", "locales", "workflows"))
    for name in re.findall(rf"`((?:{parts})(?:/\w+)*)/?`", read(DOCUMENT)):
        assert (ROOT / name).is_dir(), name


def test_every_class_and_function_it_names_exists() -> None:
    section = read(DOCUMENT).split("## Where to find what")[1].split("\n## ")[0]
    named = re.findall(r"`([A-Za-z_]+(?:\.(?!py`)[a-z_]+)?)`", section)
    assert len(named) > 10
    for name in named:
        assert set(name.split(".")) <= DEFINED, name
