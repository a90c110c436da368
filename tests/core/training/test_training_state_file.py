"""The state of a checkpoint notices every change of itself and of the files beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from easyref_core.errors import EasyRefError
from easyref_core.training.state_file import check_files, read_state, write_state

STATE = {"step": 3, "settings": {"name": "ä", "rate": 1e-4, "parts": ["a", "b"]}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "sharded").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)))
    (tmp_path / "sharded" / "part").write_bytes(b"content")
    write_state(tmp_path, STATE)
    return tmp_path


def test_a_whole_checkpoint_is_read_back(checkpoint: Path) -> None:
    state = read_state(checkpoint)
    assert {name: state[name] for name in STATE} == STATE
    assert state["files"].keys() == {"weights", "sharded/part"}
    check_files(checkpoint, state)


def test_no_flipped_bit_of_the_state_is_believed(checkpoint: Path) -> None:
    path = checkpoint / "state.json"
    whole, wanted = path.read_bytes(), read_state(checkpoint)
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert read_state(checkpoint) == wanted  # white space
        except EasyRefError:
            refused += 1
    assert refused > 0.5 * len(whole)


@pytest.mark.parametrize("name", ["weights", "sharded/part"])
def test_a_changed_file_is_named(checkpoint: Path, name: str) -> None:
    state, path = read_state(checkpoint), checkpoint / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(EasyRefError, match=f"{name} differs from its checksum"):
        check_files(checkpoint, state)
    path.write_bytes(content[:-1])
    with pytest.raises(EasyRefError, match=f"{name} differs from its checksum"):
        check_files(checkpoint, state)
    path.unlink()
    with pytest.raises(EasyRefError, match=f"{name} is missing"):
        check_files(checkpoint, state)


def test_older_checkpoints_without_checksums_are_taken_as_they_are(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text(json.dumps(STATE))
    assert read_state(checkpoint) == STATE
    check_files(checkpoint, STATE)
