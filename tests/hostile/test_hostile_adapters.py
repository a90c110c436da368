"""Adapter files and saved tokens: a sentence or the right result, in little memory and time."""

from __future__ import annotations

from pathlib import Path

import hostile_adapters
import hostile_tokens
from corpus import Case, Way, each_way, run_and_check
from fork_server import ForkServer


@each_way(adapter=hostile_adapters.CASES, tokens=hostile_tokens.CASES)
def test_hostile_adapters(case: Case, way: Way, fork_server: ForkServer, tmp_path: Path) -> None:
    run_and_check(case, way, fork_server, tmp_path / "home")
