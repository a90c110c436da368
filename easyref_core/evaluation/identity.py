"""What tells whether files are still those that a run was begun with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..untrusted import open_regular
from ..weight_file import with_shards
from ..weight_file.stamp import FileStamp


def file_identity(path: Path) -> dict[str, Any]:
    """Name, size and digest of a file, or of an index and its shards; of large ones a sample is
    read.

    Raises:
        EasyRefError: there is none, or it cannot be read.
    """
    stamps = []
    for part in with_shards(path):
        with open_regular(part) as file:
            stamps.append(FileStamp.of(file))
    stamp = FileStamp.together(stamps)
    return {"file": path.name, "bytes": stamp.size, "digest": stamp.digest}


def folder_identity(folder: Path, patterns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The identity of files in a folder, by their path in it."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {
        path.relative_to(folder).as_posix(): file_identity(path) for path in found if path.is_file()
    }
