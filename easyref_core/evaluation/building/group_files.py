"""Groups on the disk: a folder of pictures for each, with their texts, licences and sources."""

from __future__ import annotations

import csv
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import WINDOWS_DEVICES, make_folder, sweep, sync_tree, writing
from ...pictures.formats import HEAD_BYTES, recognise
from ...untrusted import open_regular
from .tagged_pictures import METADATA, Tag, TaggedPicture

_GROUPS = ["group", "tag", "kind", "split", "pictures", "licences", "similarity", "left_out"]
_LEFT_OUT = ["picture", "tag", "reason", "detail"]
_LONGEST_NAME = 60  # characters of a folder


@dataclass(frozen=True)
class LeftOut:
    """A picture that is in no group.

    Attributes:
        picture: path from the folder of all pictures.
        tag: of the group in which it would be.
        reason: why not, to follow "left out: 3 ".
        detail: such as the picture of which it is a copy.
    """

    picture: str
    tag: Tag | None
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class BuiltGroup:
    """A group to be written.

    Attributes:
        split: "held_in" or "held_out".
        similarity: mean cosine of its pictures; None without an encoder.
        left_out: how many pictures of its tag are not in it.
    """

    tag: Tag
    split: str
    pictures: tuple[TaggedPicture, ...]
    similarity: float | None
    left_out: int


def write_groups(folder: Path, groups: Sequence[BuiltGroup], left_out: Sequence[LeftOut]) -> None:
    """Write all groups, or none: the folder appears when it is complete.

    Args:
        folder: absent or empty.

    Raises:
        EasyRefError: it cannot be written, or a picture cannot be read any more.
    """
    with writing(folder):
        make_folder(folder.parent)
        sweep(folder.parent)
        part = folder.parent / f".easyref-{uuid.uuid4().hex}.part"
        part.mkdir()
        try:
            names = folder_names([group.tag for group in groups])
            for group in groups:
                _write_group(part / group.split / names[group.tag], group, folder)
            rows = [_group_row(group, names) for group in groups]
            _write_csv(part / "groups.csv", _GROUPS, rows)
            _write_csv(part / "left_out.csv", _LEFT_OUT, [_left_out_row(out) for out in left_out])
            sync_tree(part)
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def folder_names(tags: Iterable[Tag]) -> dict[Tag, str]:
    """A folder's name for each tag, which any file system takes; a number follows where two would
    be the same."""
    names: dict[Tag, str] = {}
    taken: dict[str, int] = {}
    for tag in tags:
        name = re.sub(r"[^\w-]+", "_", tag.name).strip("_")[:_LONGEST_NAME] or "group"
        if name.upper() in WINDOWS_DEVICES:
            name = f"group_{name}"
        unique = name
        while unique in taken:
            taken[name] += 1
            unique = f"{name}_{taken[name]}"
        taken[unique] = 1
        names[tag] = unique
    return names


def _write_group(folder: Path, group: BuiltGroup, out: Path) -> None:
    """
    Args:
        out: that messages name.
    """
    folder.mkdir(parents=True)
    lines = []
    for number, picture in enumerate(group.pictures):
        with open_regular(picture.path, "picture") as source:
            found = recognise(source.read(HEAD_BYTES))
            name = f"{number:04}.{found.name.lower() if found else 'png'}"
            source.seek(0)
            with writing(out), (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
        lines.append(json.dumps(_metadata(name, picture, group.tag), ensure_ascii=False) + "\n")
    (folder / METADATA).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _metadata(name: str, picture: TaggedPicture, common: Tag) -> dict[str, Any]:
    """What is known of a picture. Without a text, its caption is its tags but the group's."""
    others = [tag.name for tag in picture.tags if tag.name != common.name]
    return {
        "file_name": name,
        "text": picture.text or ", ".join(others),
        "tags": others,
        "kind": common.kind,
        "licence": picture.licence,
        "source": picture.source,
        "original": picture.name,
    }


def _group_row(group: BuiltGroup, names: dict[Tag, str]) -> list[object]:
    licences = sorted({picture.licence or "unknown" for picture in group.pictures})
    similarity = "" if group.similarity is None else f"{group.similarity:.4f}"
    return [
        *(names[group.tag], group.tag.name, group.tag.kind, group.split, len(group.pictures)),
        *("; ".join(licences), similarity, group.left_out),
    ]


def _left_out_row(out: LeftOut) -> list[object]:
    return [out.picture, out.tag.name if out.tag else "", out.reason, out.detail]


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([columns, *rows])
