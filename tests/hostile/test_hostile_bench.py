"""Groups and runs of the benchmark: a sentence or a run, in little memory and time."""

from __future__ import annotations

from pathlib import Path

import hostile_bench
import pytest
from corpus import Case, Way, check, each_way, run
from fork_server import ForkServer

pytest.importorskip("pyarrow")


@each_way(bench=hostile_bench.CASES)
def test_hostile_bench(case: Case, way: Way, training_server: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    check(case, run(case, way, training_server, folder, hostile_bench.make_bench_home), folder)
