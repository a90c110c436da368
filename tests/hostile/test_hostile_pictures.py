"""Pictures, and requests for them: a sentence or the right result, in little memory and time."""

from __future__ import annotations

from pathlib import Path

import hostile_pictures
import hostile_requests
from corpus import Case, Way, each_way, run_and_check
from fork_server import ForkServer


@each_way(picture=hostile_pictures.CASES, request=hostile_requests.CASES)
def test_hostile_pictures(case: Case, way: Way, fork_server: ForkServer, tmp_path: Path) -> None:
    run_and_check(case, way, fork_server, tmp_path / "home")
