"""Values by link, and commands: a sentence or the right result, in little memory and time."""

from __future__ import annotations

from pathlib import Path

import hostile_commands
import hostile_links
from corpus import Case, Way, each_way, run_and_check
from fork_server import ForkServer


@each_way(link=hostile_links.CASES, command=hostile_commands.CASES)
def test_hostile_values(case: Case, way: Way, fork_server: ForkServer, tmp_path: Path) -> None:
    run_and_check(case, way, fork_server, tmp_path / "home")
