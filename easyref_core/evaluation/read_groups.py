"""Groups from folders, as image folders of `datasets` and of kohya's trainers, and from the JSON of
training data.

    DIR/GROUP/*.png                        a group
    DIR/held_in/GROUP, DIR/held_out/GROUP  with its split
    DIR/held_in.json, DIR/held_out.json    training data, a group for each record
    GROUP/metadata.jsonl                   {"file_name": "a.png", "text": "...", "licence": "...",
                                           "kind": "character", "target": true} on each line; the
                                           picture marked so is the target, if any
    GROUP/a.txt                            the caption of GROUP/a.png

A `metadata.jsonl` may also lie above the groups, with names such as "GROUP/a.png".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..pictures.formats import is_picture
from ..training.records import PictureSource, Record, read_records
from ..training.shards import is_tar
from ..untrusted import escaped, inside, is_regular, parse_json, read_bytes, read_lines, shown
from .groups import GroupPicture, ReferenceGroup

SPLITS = ("held_in", "held_out")
METADATA = "metadata.jsonl"
_CAPTIONS = ("text", "caption")
_LICENCES = ("licence", "license")
_KINDS = ("kind",)
_LARGEST_METADATA = 64_000_000  # bytes
_LARGEST_CAPTION = 65_536  # bytes
_MOST_ENTRIES = 1_000_000  # of a folder


@dataclass(frozen=True)
class Described:
    """What a line of `metadata.jsonl` says of a picture."""

    caption: str = ""
    licence: str = ""
    kind: str = ""
    target: bool = False


def read_groups(path: Path, notes: list[str]) -> list[ReferenceGroup]:
    """The groups of a folder or of a JSON file, in sorted order; pictures are not opened.

    Args:
        notes: gets a sentence for everything that cannot be used.

    Raises:
        EasyRefError: no such folder or file, or one that cannot be read as a whole.
    """
    if not os.path.lexists(path):
        raise EasyRefError(f"There is neither a folder nor a file {shown(path, 300)}.")
    if not path.is_dir():
        return _from_json(path, path.parent, _split_of(path.stem), notes)
    groups: list[ReferenceGroup] = []
    for split in SPLITS:
        if is_regular(path / f"{split}.json"):
            groups += _from_json(path / f"{split}.json", path, split, notes)
        if (path / split).is_dir():
            groups += _from_folders(path / split, split, notes)
    if not groups:
        groups = _from_folders(path, "", notes)
    if not groups and any(is_picture(entry) for entry in entries(path)):
        groups = [_from_folder(path, path.name or "group", "", {}, notes)]
    return named_apart(groups)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden files.

    Raises:
        EasyRefError: the folder cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise EasyRefError(
            f"The folder {shown(folder, 300)} cannot be read ({error.strerror or error})."
        ) from error
    if len(names) > _MOST_ENTRIES:
        raise EasyRefError(
            f"{shown(folder, 300)} holds {len(names):,} files, more than {_MOST_ENTRIES:,}."
        )
    return [folder / name for name in names]


def _split_of(name: str) -> str:
    return next((split for split in SPLITS if name.startswith(split)), "")


def _from_folders(folder: Path, split: str, notes: list[str]) -> list[ReferenceGroup]:
    """A group for each folder in it that holds pictures, or pictures' descriptions."""
    described = read_metadata(folder, notes)
    return [
        _from_folder(path, path.name, split, described, notes)
        for path in entries(folder)
        if path.is_dir() and path.name not in SPLITS
    ]


def _from_folder(
    folder: Path, name: str, split: str, above: dict[Path, Described], notes: list[str]
) -> ReferenceGroup:
    try:
        described = {**above, **read_metadata(folder, notes)}
        paths = [path for path in entries(folder) if is_picture(path)]
    except EasyRefError as error:
        notes.append(str(error))
        return ReferenceGroup(name, (), split)
    pictures = []
    for path in paths:
        found = described.get(path, Described())
        caption = found.caption or caption_beside(path, notes)
        pictures.append(GroupPicture(PictureSource(path), caption, found.licence))
    kinds = [described[path].kind for path in paths if path in described and described[path].kind]
    targets = [n for n, path in enumerate(paths) if path in described and described[path].target]
    target = targets[0] if targets else None
    return ReferenceGroup(name, tuple(pictures), split, kinds[0] if kinds else "", target)


def caption_beside(picture: Path, notes: list[str]) -> str:
    """The caption in the text file of the same name; empty without one."""
    path = picture.with_suffix(".txt")
    if not is_regular(path):
        return ""
    try:
        return as_text(read_bytes(path, _LARGEST_CAPTION, "caption").decode("utf-8-sig").strip())
    except (EasyRefError, UnicodeError) as error:
        notes.append(f"The caption {shown(path, 300)} cannot be used: {escaped(str(error))}")
        return ""


def read_metadata(folder: Path, notes: list[str]) -> dict[Path, Described]:
    """What `metadata.jsonl` of a folder says, by the pictures' paths; lines that cannot be used
    are noted.
    """
    path = folder / METADATA
    if not os.path.lexists(path):
        return {}
    found: dict[Path, Described] = {}
    try:
        lines = read_lines(path, _LARGEST_METADATA, "list of captions")
    except EasyRefError as error:
        notes.append(str(error))
        return {}
    bad: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = parse_json(line, f"Line {number}")
            if not isinstance(item, dict):
                raise EasyRefError(f"Line {number} is no object.")
            picture = inside(folder, item.get("file_name"), "picture")
            found[picture] = Described(
                _first_text(item, _CAPTIONS),
                _first_text(item, _LICENCES),
                _first_text(item, _KINDS),
                item.get("target") is True,
            )
        except EasyRefError as error:
            bad.append(str(error))
    if bad:
        notes.append(
            f"{shown(path, 300)}: {len(bad)} of {len(lines)} lines cannot be used; the first: "
            f"{bad[0]}"
        )
    return found


def _first_text(item: dict[str, Any], keys: tuple[str, ...]) -> str:
    """
    Raises:
        EasyRefError: the value of the first key that is there is no text.
    """
    for key in keys:
        value = item.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise EasyRefError(f"{key} is {shown(value)}; it must be a text.")
        return as_text(value.strip())
    return ""


def as_text(value: str) -> str:
    """
    Raises:
        EasyRefError: half a surrogate pair, which neither tokenizers nor files take.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise EasyRefError(f"A text is no Unicode: {shown(value)}.") from None
    return value


def _from_json(file: Path, root: Path, split: str, notes: list[str]) -> list[ReferenceGroup]:
    """A group for each record that can be used, its target fixed.

    Args:
        root: folder that image names are relative to.
    """
    if is_regular(file) and is_tar(file):
        raise EasyRefError(
            f"{shown(file, 300)} is a tar shard; groups are read from JSON or folders. Unpack it."
        )
    records = read_records([file], root)
    broken = [record for record in records if record.broken]
    if broken:
        notes.append(
            f"{shown(file, 300)}: {len(broken)} of {len(records)} records cannot be used; "
            f"the first, {broken[0].name}, {broken[0].broken}."
        )
    width = len(str(len(records) - 1))
    return [
        _of_record(record, f"{file.stem}-{number:0{width}}", split)
        for number, record in enumerate(records)
        if not record.broken
    ]


def _of_record(record: Record, name: str, split: str) -> ReferenceGroup:
    caption = record.texts[0] if record.texts else ""
    target = GroupPicture(record.target, caption)
    references = [GroupPicture(source) for source in record.references]
    return ReferenceGroup(name, (target, *references), split, target=0)


def named_apart(groups: Sequence[ReferenceGroup]) -> list[ReferenceGroup]:
    """Names that occur in several splits get theirs before them; what is still equal, a number."""
    counts = Counter(group.name for group in groups)
    names = [
        f"{group.split}/{group.name}" if group.split and counts[group.name] > 1 else group.name
        for group in groups
    ]
    taken: dict[str, int] = {}
    named = []
    for group, name in zip(groups, names, strict=True):
        new = name
        while new in taken:
            taken[name] += 1
            new = f"{name} ({taken[name]})"
        taken[new] = 1
        named.append(replace(group, name=new))
    return named


def iter_pictures(folder: Path) -> Iterator[Path]:
    """Pictures of a folder, sorted."""
    return (path for path in entries(folder) if is_picture(path))
