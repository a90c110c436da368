"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import EasyRefError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place.

    A reader or an interrupted run never sees half a file, and processes that write the same file
    do not disturb each other.

    Raises:
        OSError: the folder cannot be written to; nothing is left behind.
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
    """Say of a file that a person named, and that cannot be written, what to do.

    Raises:
        EasyRefError: in place of an OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise EasyRefError(f"{path} cannot be written: {error}. Choose another place.") from error


def check_place(path: str | Path) -> None:
    """
    Raises:
        EasyRefError: nothing can be written there, as far as can be told without writing.
    """
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
