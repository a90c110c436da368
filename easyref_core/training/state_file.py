"""`state.json` of a checkpoint: what was trained and how, and the checksums of all its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..untrusted import escaped, is_regular, open_regular, read_json

STATE_FILE = "state.json"
_CHUNK = 1 << 20  # bytes


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a checkpoint whose other files are complete."""
    files = {
        path.relative_to(folder).as_posix(): _file_checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / STATE_FILE
    }
    content = {**state, "files": files}
    content["checksum"] = _checksum(content)
    (folder / STATE_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint.

    Raises:
        EasyRefError: it is missing or damaged.
    """
    state = read_json(folder / STATE_FILE)
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise EasyRefError(f"{escaped(str(folder / STATE_FILE))} holds no settings.")
    written = state.pop("checksum", None)
    # Older checkpoints have none.
    if (written is not None or "files" in state) and written != _checksum(state):
        raise EasyRefError(f"{escaped(str(folder / STATE_FILE))} differs from its checksum.")
    return state


def check_files(folder: Path, state: Mapping[str, Any]) -> None:
    """Compare all files of a checkpoint with their checksums, which takes about a second a GB.

    Args:
        state: of `read_state`.

    Raises:
        EasyRefError: one is missing or damaged.
    """
    for name, checksum in state.get("files", {}).items():
        path = folder / name
        if not is_regular(path):
            raise EasyRefError(f"{escaped(str(path))} is missing.")
        if _file_checksum(path) != checksum:
            raise EasyRefError(f"{escaped(str(path))} differs from its checksum.")


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _file_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
