"""Training records: groups of references with a target, from JSON lists or tar shards.

JSON is the official layout: a list of {"image_file": [..] or "..", "text": [..] or "..",
"target": ".."} or {"face": [[x1, y1, x2, y2, score], ..], "text": .., "target": ".."}. A tar shard
follows WebDataset: files with one key are one record, `KEY.json` with "text" (and "face"),
`KEY.target.png` and `KEY.0.png`, `KEY.1.png`, ... for the references.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import EasyRefError
from ..pictures import open_picture

_PICTURES = {"png", "jpg", "jpeg", "webp", "bmp"}


@dataclass(frozen=True)
class PictureSource:
    """Where a picture is: a file, or `size` bytes at `offset` of a tar shard."""

    path: Path
    offset: int | None = None
    size: int = 0
    name: str = ""

    def open(self) -> Image.Image:
        """The picture as RGB.

        Raises:
            EasyRefError: missing or broken.
        """
        if self.offset is None:
            return open_picture(self.path)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return open_picture(BytesIO(file.read(self.size)), str(self))

    def __str__(self) -> str:
        return str(self.path) if self.offset is None else f"{self.path}:{self.name}"


@dataclass(frozen=True)
class Record:
    """One group.

    Attributes:
        name: for logs.
        target: what is to be generated.
        texts: captions, one of which is drawn each time; may be empty.
        references: the group's other pictures, empty where `face` is given.
        face: (x1, y1, x2, y2) in the target, which is then its own reference.
    """

    name: str
    target: PictureSource
    texts: tuple[str, ...]
    references: tuple[PictureSource, ...] = ()
    face: tuple[float, float, float, float] | None = None


def read_records(files: Sequence[str | Path], root: str | Path) -> list[Record]:
    """All records of several data files, in order.

    Raises:
        EasyRefError: a file is neither JSON list nor tar shard, a record's keys are wrong
            (named), or there is no record at all.
    """
    records: list[Record] = []
    for file in map(Path, files):
        if tarfile.is_tarfile(file):
            records += _from_tar(file)
        else:
            records += _from_json(file, Path(root))
    if not records:
        raise EasyRefError(f"There are no records in {', '.join(map(str, files))}.")
    return records


def _from_json(file: Path, root: Path) -> list[Record]:
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EasyRefError(f"{file} is neither a JSON list nor a tar shard ({error}).") from error
    if not isinstance(items, list):
        raise EasyRefError(f"{file} holds no JSON list of records.")
    return [_json_record(item, f"{file}[{n}]", root) for n, item in enumerate(items)]


def _json_record(item: Any, name: str, root: Path) -> Record:
    if not isinstance(item, dict) or "target" not in item:
        raise EasyRefError(f"{name} has no target.")
    files = item.get("image_file", [])
    files = [files] if isinstance(files, str) else files
    if "face" not in item and not files:
        raise EasyRefError(f"{name} has neither image_file nor face, so it has no reference.")
    return Record(
        name,
        PictureSource(root / item["target"]),
        _texts(item),
        tuple(PictureSource(root / f) for f in files),
        _face(item, name),
    )


def _texts(item: dict[str, Any]) -> tuple[str, ...]:
    text = item.get("text", [])
    return (text,) if isinstance(text, str) else tuple(map(str, text))


def _face(item: dict[str, Any], name: str) -> tuple[float, float, float, float] | None:
    if "face" not in item:
        return None
    try:
        # The official layout nests the boxes once or twice; the first box counts.
        box = item["face"]
        while isinstance(box[0], list):
            box = box[0]
        x1, y1, x2, y2 = map(float, box[:4])
    except (TypeError, ValueError, IndexError):
        raise EasyRefError(f"{name}: face must be [[x1, y1, x2, y2, score]].") from None
    return x1, y1, x2, y2


def _from_tar(file: Path) -> list[Record]:
    """Index a shard: where each picture's bytes are, without reading them."""
    groups: dict[str, dict[str, Any]] = {}
    with tarfile.open(file) as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            key, _, rest = base.partition(".")
            group = groups.setdefault(f"{folder}/{key}", {"pictures": {}})
            part, _, extension = rest.rpartition(".")
            if extension.lower() in _PICTURES:
                source = PictureSource(file, member.offset_data, member.size, member.name)
                group["pictures"][part] = source
            elif rest == "json":
                content = tar.extractfile(member)
                group["json"] = json.loads(content.read()) if content else {}
    records = []
    for key, group in groups.items():
        pictures: dict[str, PictureSource] = group["pictures"]
        item, name = group.get("json", {}), f"{file}:{key}"
        target = pictures.pop("target", None)
        if target is None:
            raise EasyRefError(f"{name} has no target picture (KEY.target.png).")
        if not pictures and "face" not in item:
            raise EasyRefError(f"{name} has no reference pictures (KEY.0.png, ...) and no face.")
        ordered = tuple(pictures[k] for k in sorted(pictures, key=lambda k: (len(k), k)))
        records.append(Record(name, target, _texts(item), ordered, _face(item, name)))
    return records
