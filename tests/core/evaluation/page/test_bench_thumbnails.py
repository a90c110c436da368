"""Thumbnails: as large as fits."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from easyref_core.evaluation.page.thumbnails import LEVELS, make_thumbnails


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Ten pictures of noise, which compress badly."""
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        noise = np.random.default_rng(number).integers(0, 255, (480, 320, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return paths


def fitting(pictures: list[Path], limit: int) -> tuple[int, int, int]:
    """Pixels of the longest side, pictures, characters."""
    found, count = make_thumbnails(
        lambda n: dict.fromkeys(pictures[:n], 1.0), [10, 5, 1], lambda n: limit
    )
    assert len(found.found) == count
    return found.longest, count, found.bytes


def test_size_falls_first_and_then_their_number(pictures: list[Path]) -> None:
    largest, _, size = fitting(pictures, 10**8)
    assert largest == LEVELS[0][0]
    smaller, count, fewer = fitting(pictures, size // 3)
    assert LEVELS[-1][0] <= smaller < largest
    assert count == 10
    assert fewer <= size // 3
    longest, count, _ = fitting(pictures, size // 40)
    assert longest < largest
    assert 0 < count < 10


def test_nothing_fits_into_nothing(pictures: list[Path]) -> None:
    assert fitting(pictures, 10) == (0, 0, 0)


def test_a_thumbnail_keeps_its_shape_and_its_share(pictures: list[Path]) -> None:
    found, _ = make_thumbnails(lambda n: {pictures[0]: 0.5}, [1], lambda n: 10**8)
    thumbnail = found.found[pictures[0]]
    assert thumbnail.height == LEVELS[0][0] // 2
    assert abs(thumbnail.width - thumbnail.height * 320 / 480) < 1
    content = base64.b64decode(thumbnail.source.partition(",")[2])
    with Image.open(BytesIO(content)) as picture:
        assert picture.size == (thumbnail.width, thumbnail.height)


def test_a_picture_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    found, _ = make_thumbnails(lambda n: {tmp_path / "none.png": 1.0}, [1], lambda n: 10**6)
    assert not found.found
    assert "none.png" in found.unreadable[tmp_path / "none.png"]
