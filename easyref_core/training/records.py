"""Training records: groups of references with a target, from JSON lists or tar shards.

JSON is the official layout: a list of {"image_file": [..] or "..", "text": [..] or "..",
"target": ".."} or {"face": [[x1, y1, x2, y2, score], ..], "text": .., "target": ".."}. A tar shard
follows WebDataset: files with one key are one record, `KEY.json` with "text" (and "face"),
`KEY.target.png` and `KEY.0.png`, `KEY.1.png`, ... for the references.

A record that cannot be used stays in the list with the reason, so that it is skipped, counted and
reported like one whose image turns out to be broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import EasyRefError
from ..pictures.loading import open_picture
from ..untrusted import escaped, kind_of, number, open_regular, parse_json, read_json, shown
from .shards import Group, is_tar, read_shard

_LARGEST_LIST = 256_000_000  # bytes; several lists can be named
_LARGEST_COORDINATE = 1e6  # pixels


@dataclass(frozen=True)
class PictureSource:
    """Location of an image: a file, or `size` bytes at `offset` of a tar shard."""

    path: Path
    offset: int | None = None
    size: int = 0
    name: str = ""

    def open(self) -> Image.Image:
        """The image as RGB.

        Raises:
            EasyRefError: missing or broken.
        """
        if self.offset is None:
            return open_picture(self.path)
        with open_regular(self.path, "tar shard") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        return open_picture(BytesIO(content), str(self))

    def fingerprint(self) -> str:
        """Text that differs between images: path, offset, the file's size and time."""
        stat = self.path.stat()
        return f"{self} {self.offset} {stat.st_size} {stat.st_mtime_ns}"

    def __str__(self) -> str:
        return escaped(str(self.path) if self.offset is None else f"{self.path}:{self.name}")


@dataclass(frozen=True)
class Record:
    """One group.

    Attributes:
        name: for logs.
        target: image to generate.
        texts: captions, of which one is chosen at random each time; may be empty.
        references: the group's other images, empty where `face` is given.
        face: (x1, y1, x2, y2) in the target, which is then its own reference.
        broken: why the record cannot be used; empty if it can.
    """

    name: str
    target: PictureSource = field(default_factory=lambda: PictureSource(Path()))
    texts: tuple[str, ...] = ()
    references: tuple[PictureSource, ...] = ()
    face: tuple[float, float, float, float] | None = None
    broken: str = ""

    def check(self) -> None:
        """
        Raises:
            EasyRefError: it cannot be used.
        """
        if self.broken:
            raise EasyRefError(f"it {self.broken}.")


def read_records(files: Sequence[str | Path], root: str | Path) -> list[Record]:
    """All records of several data files, in order, including those that cannot be used.

    Raises:
        EasyRefError: a file is neither JSON list nor tar shard, or there is no record at all, or
            none that can be used.
    """
    records: list[Record] = []
    for file in map(Path, files):
        if is_tar(file):
            records += _from_tar(file)
        else:
            records += _from_json(file, Path(root))
    names = escaped(", ".join(map(str, files)))
    if not records:
        raise EasyRefError(f"There are no records in {names}.")
    if all(record.broken for record in records):
        raise EasyRefError(
            f"None of the {len(records)} records in {names} can be used; the first one, "
            f"{records[0].name}, {records[0].broken}."
        )
    return records


def _from_json(file: Path, root: Path) -> list[Record]:
    items = read_json(file, _LARGEST_LIST, "list of records")
    if not isinstance(items, list):
        raise EasyRefError(
            f"{escaped(str(file))} holds {kind_of(items)}, not a list of records. Name a JSON list "
            "or a tar shard."
        )

    def read(item: Any, name: str) -> Record:
        item = item if isinstance(item, dict) else {}
        target = item.get("target")
        source = PictureSource(root / target) if isinstance(target, str) else None
        files = _names(item.get("image_file"), "image_file")
        return _record(name, item, source, tuple(PictureSource(root / file) for file in files))

    return [_or_broken(read, item, f"{escaped(str(file))}[{n}]") for n, item in enumerate(items)]


def _or_broken(read: Callable[[Any, str], Record], item: Any, name: str) -> Record:
    try:
        return read(item, name)
    except EasyRefError as error:
        return Record(name, broken=str(error))


def _record(
    name: str,
    item: dict[str, Any],
    target: PictureSource | None,
    references: tuple[PictureSource, ...],
) -> Record:
    """
    Raises:
        EasyRefError: what the record lacks; the sentence continues its name.
    """
    if target is None:
        raise EasyRefError("has no target")
    face = _face(item)
    if face is None and not references:
        raise EasyRefError("has no reference: neither pictures nor face")
    return Record(name, target, _texts(item), references, face)


def _texts(item: dict[str, Any]) -> tuple[str, ...]:
    texts = _names(item.get("text"), "text")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair, which tokenizers do not take
            raise EasyRefError(f"has a text that is no Unicode: {shown(text)}") from None
    return texts


def _names(value: Any, key: str) -> tuple[str, ...]:
    """A text, or a list of texts; empty where the key is absent."""
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise EasyRefError(f"has something else than text as {key}")
    return tuple(texts)


def _face(item: dict[str, Any]) -> tuple[float, float, float, float] | None:
    if "face" not in item:
        return None
    try:
        # The official layout nests the boxes once or twice; the first box counts.
        box = item["face"]
        while isinstance(box[0], list):
            box = box[0]
        x1, y1, x2, y2 = (
            number(value, "a coordinate", -_LARGEST_COORDINATE, _LARGEST_COORDINATE)
            for value in box[:4]
        )
    except (TypeError, ValueError, IndexError, KeyError):  # EasyRefError is a ValueError
        raise EasyRefError("has a face that is not [[x1, y1, x2, y2, score]]") from None
    return x1, y1, x2, y2


def _from_tar(file: Path) -> list[Record]:
    """Index a shard: the offset of each image, without reading it."""

    def read(group: Group, name: str) -> Record:
        if group.broken:
            raise EasyRefError(group.broken)
        try:
            item = parse_json(group.text or "{}", "its JSON")
        except EasyRefError as error:
            raise EasyRefError(f"has JSON that cannot be used: {error}") from None
        if not isinstance(item, dict):
            raise EasyRefError("has JSON that is no section of keys")
        pictures = {
            part: PictureSource(file, member.offset, member.size, member.name)
            for part, member in group.pictures.items()
        }
        target = pictures.pop("target", None)
        ordered = tuple(pictures[k] for k in sorted(pictures, key=lambda k: (len(k), k)))
        return _record(name, item, target, ordered)

    return [
        _or_broken(read, group, f"{escaped(str(file))}:{escaped(key)}")
        for key, group in read_shard(file).items()
    ]
