"""A file that is changed or replaced while it is open never mixes its weights with the new ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import goldens
import pytest
import torch

from easyref_core.weight_file import WeightFile, open_weight_file, stamp


@pytest.fixture
def file(tmp_path: Path) -> WeightFile:
    tensors = {"a": torch.zeros(400, 1000), "b": torch.zeros(400, 1000)}
    return open_weight_file(goldens.write(tmp_path / "a.safetensors", tensors))


def other(path: Path, old: os.stat_result) -> Path:
    """Other content of the same size and time."""
    content = {"a": torch.ones(400, 1000), "b": torch.ones(400, 1000)}
    new = goldens.write(path.with_name("new.safetensors"), content)
    os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert new.stat().st_size == old.st_size
    return new


def replaced(path: Path) -> None:
    os.replace(other(path, path.stat()), path)


def overwritten(path: Path) -> None:
    old = path.stat()
    path.write_bytes(other(path, old).read_bytes())
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, overwritten])
def test_another_content_of_the_same_size_and_time_is_noticed(
    file: WeightFile, change: Callable[[Path], None]
) -> None:
    with file.open() as get:
        assert not get("a").any()
    change(file.path)
    for action in (file.check_unchanged, lambda: file.read({"a": "a"})):
        with goldens.refused(file.path, "has changed since it was loaded"):
            action()


def test_content_decides_where_a_disk_keeps_no_times(
    file: WeightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stamp, "file_state", lambda opened: (os.fstat(opened.fileno()).st_size, 1, 1, 1)
    )
    again = open_weight_file(file.path)
    again.check_unchanged()
    overwritten(file.path)
    with goldens.refused("has changed"):
        again.check_unchanged()


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the time of creation instead of ctime")
def test_a_drive_that_numbers_its_files_anew_changes_nothing(
    file: WeightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(100))
    state = stamp.file_state

    def renumbered(opened: BinaryIO) -> tuple[int, int, int, int]:
        return *state(opened)[:3], next(numbers)

    monkeypatch.setattr(stamp, "file_state", renumbered)
    again = open_weight_file(file.path)
    again.check_unchanged()
    assert not again.read({"a": "a"})["a"].any()


def test_a_change_while_it_is_read_is_noticed(file: WeightFile) -> None:
    with goldens.refused("has changed"), file.open() as get:
        get("a")
        overwritten(file.path)
        get("b")


def test_a_file_cut_off_while_it_is_read_is_an_error_not_the_end(file: WeightFile) -> None:
    with goldens.refused(file.path, "was cut off", "b"), file.open() as get:
        get("a")
        os.truncate(file.path, 2_000_000)
        get("b")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_tensors_outlive_their_file(tmp_path: Path, kind: str) -> None:
    """A mapped tensor would end the process when its file is cut off."""
    path = tmp_path / "a"
    tensors = {"a": torch.ones(1000, 1000)}
    if kind == "safetensors":
        goldens.write(path, tensors)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    held = open_weight_file(path).read({"a": "a"})["a"]
    os.truncate(path, 100)
    assert held.sum() == 1_000_000
