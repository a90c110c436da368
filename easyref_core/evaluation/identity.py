"""What tells whether files are still those that a run was begun with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..untrusted import open_regular
from ..weight_file.stamp import FileStamp


def file_identity(path: Path) -> dict[str, Any]:
    """Name, size and digest of a file; of large ones a sample is read.

    Raises:
        EasyRefError: there is none, or it cannot be read.
    """
    with open_regular(path) as file:
        stamp = FileStamp.of(file)
    return {"file": path.name, "bytes": stamp.size, "digest": stamp.digest}


def folder_identity(folder: Path, patterns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The identity of files in a folder, by their path in it."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {
        path.relative_to(folder).as_posix(): file_identity(path) for path in found if path.is_file()
    }
