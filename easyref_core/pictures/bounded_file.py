"""A file that ends a decoder's work where that would take for ever or fill the memory."""

from __future__ import annotations

import time
from typing import BinaryIO

from ..errors import EasyRefError


class BoundedFile:
    """A file for a decoder of Pillow, which reads it piece by piece.

    It has no descriptor: a decoder that maps a file would end the process if that file became
    shorter meanwhile.

    Args:
        file: open for reading.
        name: for messages.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.allow(0, 0.0)

    def allow(self, size: int, seconds: float) -> None:
        """From now on, read at most so many bytes and work for so many seconds.

        Args:
            seconds: of this thread's computing, so that neither a slow disk nor a busy machine
                makes a difference.
        """
        self._size = self._left = size
        self._end = time.thread_time() + seconds

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes, or all.

        Raises:
            EasyRefError: more bytes or seconds than are allowed.
        """
        if size is None or not 0 <= size <= self._left:
            size = self._left + 1
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise EasyRefError(
                f"{self._name} holds more than {self._size / 1e6:,.0f} MB where a picture of its "
                "size needs less. It is damaged, or holds other things too; save it again as PNG "
                "or JPEG."
            )
        if time.thread_time() > self._end:
            raise EasyRefError(
                f"{self._name} takes too long to read. It is damaged, or made to do so; save it "
                "again as PNG or JPEG."
            )
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """Nothing: whoever opened the file closes it."""
