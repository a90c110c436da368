"""Mutations of files by the thousand; `EASYREF_FUZZ=20` tries twenty times as many.

A failure names the mutation's number: `EASYREF_FUZZ_FROM=1234` starts there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus import MOST_MB, MOST_SECONDS
from fork_server import ForkServer
from homes import make_home

TIMES = int(os.environ.get("EASYREF_FUZZ", "1"))
FIRST = int(os.environ.get("EASYREF_FUZZ_FROM", "0"))
COUNTS = {
    "adapter": 400,
    "tokens": 3_000,
    "pickle": 1_000,
    "config": 300,
    "index": 300,
    "gallery": 5_000,
}


@pytest.fixture(scope="module")
def core_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """The core alone."""
    server = ForkServer(tmp_path_factory.mktemp("core_server") / "log")
    yield server
    server.close()


@pytest.mark.timeout(1_000 * TIMES)
@pytest.mark.parametrize("target", COUNTS)
def test_every_mutation_is_refused_with_a_sentence_or_used_rightly(
    target: str, core_server: ForkServer, tmp_path: Path
) -> None:
    count = COUNTS[target] * TIMES
    home = make_home(tmp_path / "home")
    found = core_server.run("fuzz.fuzz", home.base, target, FIRST, count, seconds=60 * TIMES)
    number = (home.base / "number").read_text()
    assert found.kind == "done", f"mutation {number}: {found.kind} {found.text}"
    assert not found.value["failures"], "\n".join(found.value["failures"])
    assert found.value["refused"] > count / 10
    assert found.value["slowest"] <= MOST_SECONDS
    assert found.peak <= MOST_MB
