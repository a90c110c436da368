"""Recipes, records and base models: a sentence or a run, in little memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hostile_training
import pytest
from corpus import Case, Way, check, each_way
from fork_server import ForkServer
from homes import make_home
from sdxl_directory import write_sdxl_directory

DEMO = Path(__file__).resolve().parents[2] / "demo" / "weights"

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl_directory(tmp_path_factory.mktemp("sdxl"), DEMO)


@pytest.fixture(scope="module")
def training_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("training_server") / "log", "--training")
    yield server
    server.close()


@each_way(training=hostile_training.CASES)
def test_hostile_training(
    case: Case, way: Way, training_server: ForkServer, sdxl: Path, tmp_path: Path
) -> None:
    home = make_home(tmp_path / "home")
    hostile_training.make_training_home(home, sdxl)
    case.make(home)
    check(case, training_server.run(way.function, home.base, *way.arguments), home.base)
