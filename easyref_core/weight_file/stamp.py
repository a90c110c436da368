"""What tells that a file is still the one that was opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

_HEAD = 1 << 20
_SAMPLES, _SAMPLE = 64, 4096


@dataclass(frozen=True)
class FileStamp:
    """A file's state, and a part of its content for disks whose times are coarse.

    Attributes:
        size: in bytes.
        mtime_ns, ctime_ns: when content and state were changed.
        inode: its number on the disk; another one where a file was put in its place. Compared on
            Windows only: elsewhere such a file has a ctime of its own, and network drives make up
            new numbers for one and the same file.
        digest: of its first megabyte and 64 places of 4 kB, evenly spaced.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int = field(compare=os.name == "nt")
    digest: str

    @classmethod
    def of(cls, file: BinaryIO) -> FileStamp:
        """Of a file open for reading."""
        size, *others = file_state(file)
        return cls(size, *others, _digest(file, size))

    @classmethod
    def together(cls, stamps: Iterable[FileStamp]) -> FileStamp:
        """Of several files as one: sums, so that a change of any of them changes it."""
        stamps = list(stamps)
        if len(stamps) == 1:
            return stamps[0]
        size = mtime_ns = ctime_ns = inode = 0
        digest = hashlib.blake2b(digest_size=16)
        for stamp in stamps:
            size += stamp.size
            mtime_ns += stamp.mtime_ns
            ctime_ns += stamp.ctime_ns
            inode += stamp.inode
            digest.update(stamp.digest.encode())
        return cls(size, mtime_ns, ctime_ns, inode, digest.hexdigest())


def file_state(file: BinaryIO) -> tuple[int, int, int, int]:
    """(size, mtime_ns, ctime_ns, inode) of an open file."""
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    digest.update(file.read(_HEAD))
    last = size - _SAMPLE
    if last > _HEAD:
        for number in range(_SAMPLES):
            file.seek(_HEAD + (last - _HEAD) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
