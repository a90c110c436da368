"""Regular files, opened without waiting and read up to a limit; names that stay in their folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import EasyRefError
from .messages import escaped, shown

MAX_TEXT_BYTES = 4_000_000  # a configuration, a recipe, a gallery; lists of records have their own

MAX_LINES = 1_000_000


@contextmanager
def open_regular(path: str | Path, what: str = "file") -> Iterator[BinaryIO]:
    """A regular file, open for reading. Pipes and devices are refused without waiting for them.

    Args:
        what: for messages, such as "weight file".

    Raises:
        EasyRefError: missing, not a regular file, or not readable.
    """
    name = escaped(str(path))
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        check_regular(path, what)
        with os.fdopen(os.open(path, flags), "rb") as file:
            # Again, as the name may lead elsewhere by now.
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise EasyRefError(f"{name} is not a regular file. Name another {what}.")
            yield file
    except OSError as error:
        raise EasyRefError(
            f"{name} cannot be read ({error.strerror or error}). Check its permissions and its "
            "disk."
        ) from error


def check_regular(path: str | Path, what: str = "file") -> os.stat_result:
    """The state of a regular file, which is not opened.

    Raises:
        EasyRefError: see `open_regular`.
    """
    name = escaped(str(path))
    try:
        state = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise EasyRefError(f"There is no {what} {name}. Check the name and the folder.") from None
    except (OSError, ValueError) as error:  # links in a circle, names too long or with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise EasyRefError(
            f"{name} cannot be read ({reason}). Check the name and its permissions."
        ) from None
    if stat.S_ISDIR(state.st_mode):
        raise EasyRefError(f"{name} is a folder where a {what} is needed. Name a file in it.")
    if not stat.S_ISREG(state.st_mode):
        raise EasyRefError(
            f"{name} is a pipe or a device, not a regular file. Name another {what}."
        )
    return state


def is_regular(path: str | Path) -> bool:
    """Whether there is a regular file of this name, be the name ever so odd."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | Path, limit: int = MAX_TEXT_BYTES, what: str = "file") -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        EasyRefError: see `open_regular`; the file is larger.
    """
    with open_regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        # Neither memory for a sparse file, nor a buffer as large as the limit.
        content = b"" if size > limit else file.read(size)
    if size > limit:
        raise EasyRefError(
            f"{escaped(str(path))} is larger than the {limit:,} bytes that a {what} can have. "
            "Check that it is the right file."
        )
    return content


def read_lines(
    path: str | Path, limit: int = MAX_TEXT_BYTES, what: str = "file", most: int = MAX_LINES
) -> list[bytes]:
    """The lines of a regular file; a large file of empty ones would take gigabytes.

    Raises:
        EasyRefError: see `read_bytes`; there are more than `most` lines.
    """
    content = read_bytes(path, limit, what)
    if content.count(b"\n") + content.count(b"\r") > most:
        raise EasyRefError(
            f"{escaped(str(path))} has more than the {most:,} lines that a {what} can have. Check "
            "that it is the right file."
        )
    return content.splitlines()


def inside(folder: str | Path, name: Any, what: str = "file") -> Path:
    """The path of a file that another file of the folder names.

    Links may lead to other places of the folder only, and to the stores of Hugging Face's cache,
    where its downloads lie.

    Raises:
        EasyRefError: no name, or one that leads out of the folder.
    """
    folder = Path(folder)
    if not isinstance(name, str) or not name or "\0" in name:
        raise EasyRefError(
            f"{escaped(str(folder))} names {shown(name)} as a {what}; a file name is needed. Get "
            "the folder again."
        )
    path = folder / name.replace("\\", "/")
    try:
        resolved = path.resolve()
        within = resolved.is_relative_to(folder.resolve()) or _is_in_hub_store(resolved)
    except (OSError, RuntimeError, ValueError):  # links in a circle, names too long
        within = False
    if not within or ".." in Path(name.replace("\\", "/")).parts:
        raise EasyRefError(
            f"{escaped(str(folder))} names the {what} {shown(name)}, which lies outside the "
            "folder. Put the file itself into the folder, or get the folder again."
        )
    return path


def _is_in_hub_store(path: Path) -> bool:
    """Whether a path is a content of Hugging Face's cache, models--OWNER--NAME/blobs/HASH."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")
