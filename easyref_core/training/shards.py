"""WebDataset tar shards: where their pictures lie. Only headers and JSON are read."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import EasyRefError
from ..untrusted import MAX_TEXT_BYTES, escaped, open_regular

_PICTURES = {"png", "jpg", "jpeg", "webp", "bmp"}
_LARGEST_PICTURE = 256_000_000  # bytes
_LARGEST_HEADER = 1_000_000  # bytes, long names and attributes included
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass(frozen=True)
class Member:
    """`size` bytes at `offset` of a shard."""

    name: str
    offset: int
    size: int


@dataclass
class Group:
    """The files of one key.

    Attributes:
        pictures: by the part of their name after the key.
        text: content of the JSON file.
        broken: why the group cannot be used; empty if it can.
    """

    pictures: dict[str, Member] = field(default_factory=dict)
    text: bytes = b""
    broken: str = ""


class _HeaderFile:
    """A shard for `tarfile`, which would otherwise read as much as a damaged header says."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


def is_tar(path: Path) -> bool:
    """Whether a file is a tar shard, compressed or not.

    Raises:
        EasyRefError: it cannot be read.
    """
    with open_regular(path, "data file") as file:
        if file.read(8).startswith(_COMPRESSED):
            return True
        file.seek(0)
        try:
            tarfile.open(fileobj=_HeaderFile(file), mode="r:").close()
        except Exception:  # damaged headers raise anything
            return False
    return True


def read_shard(path: Path) -> dict[str, Group]:
    """The groups of a shard that hold pictures or JSON, by key.

    Raises:
        EasyRefError: it is compressed or damaged.
    """
    groups: dict[str, Group] = {}
    with open_regular(path, "tar shard") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=_HeaderFile(file), mode="r:") as tar:
                _read_members(tar, file, size, groups)
        except Exception as error:  # damaged headers raise anything
            if isinstance(error, OSError) and not isinstance(error, tarfile.TarError):
                raise  # the disk's
            raise EasyRefError(
                f"{escaped(str(path))} cannot be read as a plain tar shard "
                f"({escaped(str(error))}). Shards must not be compressed; unpack it with gunzip, "
                "or pack it again."
            ) from error
    return {key: group for key, group in groups.items() if group != Group()}


def _read_members(
    tar: tarfile.TarFile, file: BinaryIO, size: int, groups: dict[str, Group]
) -> None:
    position = -1
    while (member := tar.next()) is not None:
        tar.members.clear()  # it keeps them all
        if not position < member.offset <= member.offset_data:
            raise tarfile.ReadError("its headers lead in a circle")
        position = member.offset
        if member.isfile():
            _note_member(member, file, size, groups)
    # It takes a damaged header for the end.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"it is cut off or damaged after {tar.offset:,} bytes")


def _note_member(
    member: tarfile.TarInfo, file: BinaryIO, size: int, groups: dict[str, Group]
) -> None:
    folder, _, base = member.name.rpartition("/")
    key, _, rest = base.partition(".")
    part, _, extension = rest.rpartition(".")
    is_text, is_picture = rest == "json", extension.lower() in _PICTURES
    if not (is_text or is_picture):
        return
    group = groups.setdefault(f"{folder}/{key}", Group())
    if not 0 <= member.size <= (MAX_TEXT_BYTES if is_text else _LARGEST_PICTURE):
        group.broken = f"has a {rest} of {member.size:,} bytes"
    elif member.sparse is not None or member.offset_data + member.size > size:
        group.broken = f"has a {rest} that is cut off or has holes"
    elif is_picture:
        group.pictures[part] = Member(member.name, member.offset_data, member.size)
    else:
        file.seek(member.offset_data)
        group.text = file.read(member.size)
