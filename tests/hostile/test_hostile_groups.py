"""Tagged pictures and runs to compare: a sentence or a result, in little memory and time."""

from __future__ import annotations

from pathlib import Path

import hostile_groups
from corpus import Case, Way, check, each_way, run
from fork_server import ForkServer


@each_way(groups=hostile_groups.CASES)
def test_hostile_groups(case: Case, way: Way, fork_server: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    check(case, run(case, way, fork_server, folder, hostile_groups.make_groups_home), folder)
