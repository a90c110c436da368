"""The small models, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
import score_models


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score_models.write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score_models.write_dinov2(tmp_path_factory.mktemp("models") / "dinov2")


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score_models.write_dino(tmp_path_factory.mktemp("models") / "dino")
