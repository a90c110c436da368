"""Writing files atomically, with errors that say what to do."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import EasyRefError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file beside `path`, then move that into place.

    Nobody reads half a file, even after an interrupted run, and processes that write the same file
    do not disturb each other.

    Raises:
        OSError: the folder cannot be written to; no temporary file remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into EasyRefError.

    Args:
        path: named by the user.
    """
    try:
        yield
    except OSError as error:
        raise EasyRefError(f"{path} cannot be written: {error}. Choose another place.") from error


def check_place(path: str | Path) -> None:
    """Raise EasyRefError where `path` cannot be written, as far as can be told without writing."""
    path = Path(path)
    folder = next((parent for parent in path.parents if parent.exists()), None)
    if path.is_dir():
        code = errno.EISDIR
    elif folder is None or not folder.is_dir():
        code = errno.ENOTDIR
    elif not os.access(folder, os.W_OK):
        code = errno.EACCES
    else:
        return
    with writing(path):
        raise OSError(code, os.strerror(code), str(path))
