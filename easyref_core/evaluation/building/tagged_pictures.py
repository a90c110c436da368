"""Pictures of a folder with what is known of them: text, tags, licence, source.

It stands in a `metadata.jsonl` (a line for each picture, as in the image folders of the library
datasets), in `NAME.txt` beside `NAME.png`, and in the names of the folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import EasyRefError
from ...pictures.formats import is_picture
from ...untrusted import escaped, inside, is_regular, parse_json, read_bytes, shown

METADATA = "metadata.jsonl"
# As in the paper's list of tags: names of celebrities and characters, styles, subjects.
KINDS = ("person", "celebrity", "character", "style", "artist", "subject", "object")
_LARGEST_METADATA = 256_000_000  # bytes
_LONGEST_TEXT = 10_000  # characters
_LONGEST_TAG = 200
_MOST_TAGS = 500
_MOST_WORDS = 6  # of a tag; a longer part makes a file's text a sentence
_KIND = re.compile(rf"({'|'.join(KINDS)}):\s*(.+)")


@dataclass(frozen=True)
class Tag:
    """What pictures of a group have in common.

    Attributes:
        name: lower case, words parted by single blanks.
        kind: one of `KINDS`, or empty.
    """

    name: str
    kind: str = ""


@dataclass(frozen=True)
class TaggedPicture:
    """A picture that is not opened yet.

    Attributes:
        name: path from the folder, with slashes.
        text: caption; may be empty.
        group: that it is said to belong to; empty where tags decide.
        folder: the tag that its folder stands for; None in the uppermost.
    """

    path: Path
    name: str
    text: str = ""
    tags: tuple[Tag, ...] = ()
    licence: str = ""
    source: str = ""
    group: Tag | None = None
    folder: Tag | None = None


@dataclass
class TaggedFolder:
    """The pictures of a folder, by name, and what of its texts cannot be used, in sentences."""

    pictures: list[TaggedPicture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def tag_of(text: str) -> Tag | None:
    """The tag that a text stands for, such as "style: ukiyo-e" or "Hatsune_Miku"; None for none."""
    name = " ".join(text.replace("_", " ").casefold().split())
    found = _KIND.fullmatch(name)
    kind, name = found.groups() if found else ("", name)
    return Tag(name, kind) if 0 < len(name) <= _LONGEST_TAG else None


def read_tag_list(file: str | Path) -> list[Tag]:
    """The tags of a text file, one a line; lines that begin with # are passed over.

    Raises:
        EasyRefError: it cannot be read, or holds no tag.
    """
    lines = _text_of(file, "list of tags").splitlines()
    found = [tag_of(line) for line in lines if not line.lstrip().startswith("#")]
    tags = list(dict.fromkeys(tag for tag in found if tag))
    if not tags:
        raise EasyRefError(f"There is no tag in {escaped(str(file))}. Write one in each line.")
    return tags


def read_tagged(folder: str | Path) -> TaggedFolder:
    """All pictures of a folder and of those in it, hidden ones and links to folders left out.

    Raises:
        EasyRefError: it is no folder, or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EasyRefError(
            f"There is no folder {escaped(str(folder))}. Name one with tagged pictures."
        )
    result = TaggedFolder()
    found: dict[Path, TaggedPicture] = {}
    for parent, names in _folders(folder, result.problems):
        place = parent.relative_to(folder)
        tag = tag_of(place.name)
        for name in names:
            path = parent / name
            if Path(name).suffix.lower() not in (".txt", ".jsonl", ".json") and is_picture(path):
                picture = TaggedPicture(path, (place / name).as_posix(), folder=tag)
                found[path] = _with_text_file(picture, result.problems)
        if METADATA in names:
            _add_metadata(parent, found, result.problems)
    if not found:
        raise EasyRefError(
            f"There is no picture in {escaped(str(folder))}. Put pictures with their tags into it."
        )
    result.pictures = sorted(found.values(), key=lambda picture: picture.name)
    if len({picture.folder for picture in result.pictures}) == 1:
        # A folder that holds them all says nothing.
        result.pictures = [replace(picture, folder=None) for picture in result.pictures]
    return result


def _folders(folder: Path, problems: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """Folders with the names of their files, the lowest first: a metadata file further up says
    the last word."""

    def failed(error: OSError) -> None:
        problems.append(f"{escaped(str(error.filename))} cannot be read ({error.strerror})")

    walked = []
    for parent, below, names in os.walk(folder, onerror=failed):
        below[:] = sorted(name for name in below if not name.startswith("."))
        walked.append((Path(parent), sorted(n for n in names if not n.startswith("."))))
    return reversed(walked)


def _text_of(file: str | Path, what: str) -> str:
    """
    Raises:
        EasyRefError: it cannot be read, or is no UTF-8.
    """
    try:
        return read_bytes(file, what=what).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise EasyRefError(
            f"{escaped(str(file))} is no text in UTF-8. Save it in this encoding."
        ) from None


def _with_text_file(picture: TaggedPicture, problems: list[str]) -> TaggedPicture:
    """With the text beside it: a list of tags if that is what it looks like, else a caption."""
    path = picture.path.with_suffix(".txt")
    if not is_regular(path):
        return picture
    try:
        text = " ".join(_text_of(path, "caption").split())
        if len(text) > _LONGEST_TEXT:
            raise EasyRefError(f"{escaped(str(path))} is longer than {_LONGEST_TEXT:,} characters")
    except EasyRefError as error:
        problems.append(str(error))
        return picture
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) > 1 and "." not in text and all(len(p.split()) <= _MOST_WORDS for p in parts):
        return replace(picture, tags=_tags(parts))
    return replace(picture, text=text)


def _tags(texts: list[str]) -> tuple[Tag, ...]:
    found = (tag_of(text) for text in texts[:_MOST_TAGS])
    return tuple(dict.fromkeys(tag for tag in found if tag))


def _add_metadata(parent: Path, found: dict[Path, TaggedPicture], problems: list[str]) -> None:
    """Add what a metadata file says of pictures."""
    file = parent / METADATA
    try:
        lines = read_bytes(file, _LARGEST_METADATA, "metadata file").splitlines()
    except EasyRefError as error:
        problems.append(str(error))
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{escaped(str(file))}, line {number}"
        try:
            # What cannot be one is not parsed, as a hundred thousand errors take seconds.
            looks_right = line.lstrip()[:1] == b"{" and line.rstrip()[-1:] == b"}"
            row = parse_json(line, place) if looks_right else None
            if not isinstance(row, dict):
                raise EasyRefError(f"{place} is no JSON object.")
            path = inside(parent, row.get("file_name"), "picture")
            picture = found.get(path)
            if picture is None:
                raise EasyRefError(f"{place}: there is no picture {shown(row['file_name'])}.")
            found[path] = _with_row(picture, row, place)
        except EasyRefError as error:
            problems.append(str(error))


def _with_row(picture: TaggedPicture, row: dict[str, Any], place: str) -> TaggedPicture:
    """
    Raises:
        EasyRefError: a value of another type, too long, or no Unicode.
    """
    tags = row.get("tags")
    if isinstance(tags, str):
        tags = tags.split(",")
    elif tags is not None and not (
        isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)
    ):
        raise EasyRefError(f"{place}: tags is {shown(tags)}; it must be a list of texts.")
    for tag in tags or ():
        _checked(tag, "a tag", place)
    group, kind = tag_of(_value(row, "group", place)), _value(row, "kind", place)
    if group is not None and kind:
        group = replace(group, kind=kind[:_LONGEST_TAG])
    return replace(
        picture,
        text=_value(row, "text", place) or picture.text,
        tags=picture.tags if tags is None else _tags(tags),
        licence=_value(row, "licence", place) or _value(row, "license", place),
        source=_value(row, "source", place),
        group=group,
    )


def _value(row: dict[str, Any], key: str, place: str) -> str:
    """The text of a key, on one line; empty where it is absent. Of a list of texts, the first."""
    value = row.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    return "" if value is None else " ".join(_checked(value, key, place).split())


def _checked(value: Any, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise EasyRefError(f"{place}: {key} is {shown(value)}; it must be a text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        raise EasyRefError(f"{place}: {key} is no Unicode: {shown(value)}.") from None
    if len(value) > _LONGEST_TEXT:
        raise EasyRefError(f"{place}: {key} is longer than {_LONGEST_TEXT:,} characters.")
    return value
