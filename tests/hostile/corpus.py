"""A case of the corpus, how it is run, and what must hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer, Outcome
from homes import Home, make_home

from workshop.comfyui.find_comfyui import find_comfyui

MOST_MB = 200
MOST_SECONDS = 2

REFUSED, USED, EITHER = "refused", "used", "either"


@dataclass(frozen=True)
class Way:
    """A way in: a function of `entry_points` with its arguments."""

    function: str
    arguments: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.function


@dataclass(frozen=True)
class Case:
    """Something hostile.

    Attributes:
        name: what it is.
        make: puts it into a healthy home.
        ways: in which it gets in.
        result: what must become of it.
        said: a pattern that the refusal contains.
        mapped: megabytes of address space that its large file may take.
        needs: megabytes that it takes even where all is well, such as a large picture's pixels;
            where it is used, each 100 of them take a second.
        closest: where it is used, how far its tokens may be from those of healthy files.
    """

    name: str
    make: Callable[[Home], Any]
    ways: tuple[Way, ...]
    result: str = REFUSED
    said: str = ""
    mapped: int = 0
    needs: int = 0
    closest: float | None = None


def run(
    case: Case,
    way: Way,
    server: ForkServer,
    folder: Path,
    prepare: Callable[[Home], Any] | None = None,
) -> Outcome:
    """The case in one way, in a fresh home that `prepare` may complete."""
    home = make_home(folder)
    if prepare is not None:
        prepare(home)
    case.make(home)
    return server.run(way.function, home.base, *way.arguments, mapped=case.mapped, **way.more)


def check(case: Case, outcome: Outcome, folder: Path) -> None:
    """Raise AssertionError unless the outcome is as promised."""
    assert not (folder / "marker").exists(), "a program was started"
    assert outcome.kind in ("done", "refused"), f"{outcome.kind}: {outcome.text}"
    if outcome.kind == "refused":
        check_sentence(outcome.text)
        assert case.result != USED, f"refused: {outcome.text}"
        assert re.search(case.said, outcome.text), outcome.text
    else:
        assert case.result != REFUSED, f"accepted: {outcome.value}"
        if case.closest is not None and "difference" in outcome.value:
            assert outcome.value["difference"] <= case.closest
    assert outcome.peak <= MOST_MB + case.needs, f"took {outcome.peak:.0f} MB"
    used = case.needs if outcome.kind == "done" else 0
    assert outcome.cpu <= MOST_SECONDS + used / 100, f"computed for {outcome.cpu:.1f} s"


def check_sentence(text: str) -> None:
    """A refusal is one line for the person at the graph."""
    assert "Traceback" not in text, text
    assert text.isprintable(), f"control characters in {text!r}"
    assert len(text) <= 2_000, f"{len(text)} characters: {text[:500]}"
    assert text.endswith((".", ")")), text
    assert not re.search("MemoryError|(enough|out of) memory", text), f"not bounded: {text}"


def each_way(**kinds: tuple[Case, ...]) -> pytest.MarkDecorator:
    """Parametrise a test by every case in every way in."""
    parameters = [
        pytest.param(case, way, id=f"{kind}: {case.name}, by {way}")
        for kind, cases in kinds.items()
        for case in cases
        for way in case.ways
    ]
    return pytest.mark.parametrize(("case", "way"), parameters)


def run_and_check(case: Case, way: Way, server: ForkServer, folder: Path) -> None:
    if way.function.startswith("comfy_") and find_comfyui() is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or run python -m workshop.comfyui.find_comfyui")
    check(case, run(case, way, server, folder), folder)
