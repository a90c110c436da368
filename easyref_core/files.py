"""Writing files: what may be replaced, whole or not at all, with errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import EasyRefError
from .untrusted import escaped, is_regular

_UNFINISHED = re.compile(r"\.easyref-[0-9a-f]{32}\.part")
_LOCK, _CONTENT = "lock", "content"
WINDOWS_DEVICES = {  # no file can have their names there, whatever extension follows
    *("CON", "PRN", "AUX", "NUL"),
    *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10)),
}
_LONGEST = 300  # characters of a path in messages
_ABANDONED_AFTER = 24 * 3600.0  # seconds, where a file system has no locks


def write_atomically(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Call `write` with a temporary file beside `path`, then move that into place.

    Nobody reads half a file, even after a power cut, and processes that write the same file do not
    disturb each other. What a killed process leaves is removed by `sweep`.

    Args:
        replace: a file that is there; otherwise it stays, and FileExistsError is raised.

    Raises:
        OSError: the folder cannot be written to; no temporary file remains.
    """
    with _unfinished(path) as folder:
        content = _complete(folder / _CONTENT, write)
        if replace:
            os.replace(content, path)
        else:
            _move_to_new(content, path)
        sync(path.parent)


def write_together(
    writers: Mapping[Path, Callable[[Path], object]], old: Iterable[Path] = ()
) -> None:
    """Write several files of a folder, each as `write_atomically` does: all of them or none.

    Args:
        writers: path -> what writes it. Through the last one the others are found, such as an
            index: it is moved into place last, so even a killed process leaves no half set there.
        old: files that go, their index first. Any other file stays, and where one is in the way,
            FileExistsError is raised.

    Raises:
        OSError: see `write_atomically`; everything is as it was.
    """
    *_, last = writers
    with _unfinished(last) as folder:
        contents = {
            path: _complete(folder / f"{_CONTENT}{number}", write)
            for number, (path, write) in enumerate(writers.items())
        }
        with contextlib.ExitStack() as undo:
            for number, path in enumerate(old):
                aside = folder / f"old{number}"
                os.replace(path, aside)
                undo.callback(os.replace, aside, path)
            for path, content in contents.items():
                _move_to_new(content, path)
                undo.callback(path.unlink)
            undo.pop_all()
        sync(last.parent)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A locked temporary folder beside a path; a folder, as libraries that write atomically
    themselves put more beside the file."""
    make_folder(path.parent)
    folder = path.with_name(f".easyref-{uuid.uuid4().hex}.part")
    folder.mkdir()
    try:
        with (folder / _LOCK).open("wb") as lock:
            _lock(lock)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _complete(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file of such a folder, and wait until it is on the disk."""
    write(path)
    # As any new file; libraries may let only its owner read it.
    shutil.copymode(path.with_name(_LOCK), path)
    sync(path)
    return path


def _move_to_new(source: Path, path: Path) -> None:
    """
    Raises:
        FileExistsError: there is something.
    """
    if os.name == "posix":
        try:
            os.link(source, path)  # unlike a rename, never replaces
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    os.rename(source, path)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power cut does not lose them."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir():
        if os.name == "posix":  # elsewhere folders cannot be opened
            descriptor = os.open(path, os.O_RDONLY)
            try:
                with contextlib.suppress(OSError):  # some network file systems
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def sweep(folder: Path) -> None:
    """Remove what killed calls of `write_atomically` have left in a folder.

    Files that another process is writing stay.
    """
    try:
        found = [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name)]
    except OSError:  # no such folder, or not readable
        return
    for path in found:
        if path.is_dir() and not path.is_symlink() and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock of an unfinished file."""
    try:
        with (folder / _LOCK).open("rb+") as lock:
            if _lock(lock):
                return True
    except FileNotFoundError:  # killed before it was made, or just about to be
        pass
    except OSError:
        return False
    try:
        return time.time() - folder.stat().st_mtime > _ABANDONED_AFTER
    except OSError:
        return False


def _lock(file: BinaryIO) -> bool | None:
    """Whether a file could be locked for this process; closing it frees it. None where the system
    or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Keep a lock file for this process, which no second one gets meanwhile.

    Where the system or the file system has no locks, nothing is kept.

    Args:
        path: of the lock file, which stays.
        what: for messages, such as "benchmark run".

    Raises:
        EasyRefError: another process holds it, or it cannot be written.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
    with writing(path):
        file = os.fdopen(os.open(path, flags, 0o666), "rb+", buffering=0)
    with file:
        if _lock(file) is False:
            raise EasyRefError(
                f"Another {what} works in {_shown(path.parent)}. Wait for it to end, or choose "
                "another place."
            )
        yield


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into EasyRefError.

    Args:
        path: named by the user.
    """
    try:
        yield
    except OSError as error:
        raise EasyRefError(
            f"{_shown(path)} cannot be written ({escaped(error.strerror or str(error))}). Choose "
            "another place."
        ) from error


def check_place(path: str | Path) -> None:
    """Raise EasyRefError where `path` cannot be written, as far as can be told without writing."""
    path = Path(path)
    with writing(path):
        if "\0" in str(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # a name that is too long
        folder = next((parent for parent in path.parents if parent.exists()), None)
        if path.is_dir():
            code = errno.EISDIR
        elif folder is None or not folder.is_dir():
            code = errno.ENOTDIR
        elif not os.access(folder, os.W_OK):
            code = errno.EACCES
        else:
            return
        raise OSError(code, os.strerror(code), str(path))


def check_output(
    path: str | Path,
    kind: str,
    is_one: Callable[[Path], bool],
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Check a file that is to be written, before anything is computed for it.

    Args:
        kind: of its content, for messages, such as "reference tokens".
        is_one: whether an existing file is of that kind; only such files are ever replaced.
        inputs: files and folders that are read.
        overwrite: whether an existing file may be replaced.

    Raises:
        EasyRefError: it cannot be written there, is an input or lies in one, or exists.
    """
    path = Path(path)
    check_place(path)
    check_apart(path, inputs)
    if not os.path.lexists(path):
        return
    name = _shown(path)
    if not is_regular(path) or not is_one(path):
        raise EasyRefError(
            f"{name} exists and holds something else than {kind}, so it is never replaced. Choose "
            "another name."
        )
    if not overwrite:
        raise EasyRefError(
            f"{name} exists. Choose another name, or add --overwrite (in Python overwrite=True) to "
            "replace it."
        )


def check_apart(path: str | Path, inputs: Iterable[str | Path]) -> None:
    """
    Raises:
        EasyRefError: writing `path` would change an input: a file, or a folder with all in it.
    """
    path = Path(path)
    for source in map(Path, inputs):
        if is_within(path, source):
            raise EasyRefError(
                f"{_shown(path)} is, or lies in, {_shown(source)}, which is read; "
                "nothing can be written there. Choose another place."
            )


def is_within(path: Path, other: Path) -> bool:
    """Whether a path is another, under whatever name, or lies in that folder."""
    try:
        if path.exists() and other.exists() and path.samefile(other):
            return True
        return path.resolve().is_relative_to(other.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, names too long
        return False


def new_name(path: Path) -> Path:
    """A name at which nothing is, made from one by a number: `name_1.png` where `name.png` is."""
    number, found = 0, path
    while os.path.lexists(found):
        number += 1
        found = path.with_stem(f"{path.stem}_{number}")
    return found


def _shown(path: str | Path) -> str:
    text = escaped(str(path))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
