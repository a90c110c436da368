"""What folders hold, listed without raising and without waiting, whatever lies in them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ...easyref_core.untrusted import escaped

_MOST_FOLDERS = 10_000
_DEPTH = 32
_SHOWN = 10

Item = TypeVar("Item")


class Choices(dict[str, Item]):
    """What can be chosen in a node, by its name with / between folders.

    A name that a workflow saved on Windows, with backslashes, finds the same.
    """

    def find(self, name: Any) -> Item | None:
        if not isinstance(name, str):  # a link may bring anything
            return None
        return self.get(name, self.get(name.replace("\\", "/")))

    def names(self) -> Names:
        """In order, as the options of an input."""
        return Names(sorted(self))

    def __str__(self) -> str:
        """Some of the names, for messages."""
        names = [escaped(name) for name in sorted(self)]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return (", ".join(names[:_SHOWN]) or "none") + more


class Names(list[str]):
    """Options of an input, which ComfyUI looks values up in; backslashes count as slashes."""

    def __contains__(self, name: Any) -> bool:
        if super().__contains__(name):
            return True
        return isinstance(name, str) and super().__contains__(name.replace("\\", "/"))


def files_in(folders: Iterable[str | Path], endings: Iterable[str]) -> Choices[Path]:
    """The regular files with one of these endings at any depth; the first of a name counts."""
    endings = tuple(endings)
    found: Choices[Path] = Choices()
    for folder in folders:
        for path, is_folder in _below(Path(folder), _DEPTH):
            if not is_folder and path.name.lower().endswith(endings):
                found.setdefault(path.relative_to(folder).as_posix(), path)
    return found


def folders_in(folder: str | Path, depth: int) -> Iterator[tuple[str, Path]]:
    """(name, path) of the folders up to `depth` levels below a folder."""
    for path, is_folder in _below(Path(folder), depth):
        if is_folder:
            yield path.relative_to(folder).as_posix(), path


def _below(base: Path, depth: int) -> Iterator[tuple[Path, bool]]:
    """(path, whether it is a folder) of files and folders up to `depth` levels below a folder.

    Links are followed, but not round in a circle. Left out are hidden folders, pipes and devices,
    what cannot be read, and whatever comes after ten thousand folders.
    """
    waiting = [(base, depth, frozenset[str]())]
    count = 0
    while waiting and count < _MOST_FOLDERS:
        folder, depth, above = waiting.pop()
        count += 1
        real = os.path.realpath(folder)
        if real in above:
            continue
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        inner = []
        for entry in entries:
            path = folder / entry.name
            try:
                if entry.is_file():
                    yield path, False
                elif entry.is_dir() and not entry.name.startswith("."):
                    yield path, True
                    inner.append((path, depth - 1, above | {real}))
            except OSError:  # such as a link that leads to itself
                continue
        if depth > 1:
            waiting += reversed(inner)
