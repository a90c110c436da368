"""Recipes, records and base models: a sentence or a run, in little memory and time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hostile_training
import pytest
from corpus import Case, Way, check, each_way, run
from fork_server import ForkServer
from sdxl_directory import write_sdxl_directory

from workshop.demo.tiny import write_tiny_set

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    return write_sdxl_directory(folder / "sdxl", write_tiny_set(folder / "tiny"))


@each_way(training=hostile_training.CASES)
def test_hostile_training(
    case: Case, way: Way, training_server: ForkServer, sdxl: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "home"
    prepare = partial(hostile_training.make_training_home, sdxl=sdxl)
    check(case, run(case, way, training_server, folder, prepare), folder)
