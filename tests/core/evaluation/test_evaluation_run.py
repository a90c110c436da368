"""A whole run with fake methods and metrics: its folder, its table, and what it does again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_fakes import bench, make_groups, settings_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three groups, of 3, 4 and 5 pictures."""
    make_groups(tmp_path / "groups", {"a": 3, "b": 4, "c": 5})
    return tmp_path


def test_a_run_leaves_images_scores_and_results(folder: Path) -> None:
    summary = bench(settings_for(folder, ["weight=0.5,1"]))
    assert summary is not None
    assert (summary.done, summary.failed) == (9, 0)
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["notes"] == ["DINO is missing."]
