"""Groups from published data sets, in the layouts in which they are published."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..pictures.formats import is_picture
from ..training.records import PictureSource
from ..untrusted import inside, is_regular, read_bytes, read_json, shown
from .groups import GroupPicture, ReferenceGroup
from .read_groups import as_text, caption_beside, entries, iter_pictures, read_metadata

_LARGEST_ANNOTATIONS = 256_000_000  # bytes
_ANNOTATIONS = ("captions_val2017.json", "captions_val2014.json")
_PROMPTS_FILE = "prompts_and_classes.txt"
_CLASS = re.compile(r"^([\w-]+),([\w -]+)$", re.MULTILINE)
_PROMPT = re.compile(r"^'(.*)'\.format\(", re.MULTILINE)
_LIVE = {"cat", "dog"}  # have prompts of their own
_SET_PICTURE = re.compile(r"(.+)_(\d+)")


def read_coco(path: Path, notes: list[str]) -> list[ReferenceGroup]:
    """A group of one for each picture that has a caption: COCO's annotations with their pictures,
    or any folder.
    """
    _check_folder(path)
    for name in _ANNOTATIONS:
        for file in (path / "annotations" / name, path / name):
            if is_regular(file):
                return _of_annotations(path, file, notes)
    described = read_metadata(path, notes)
    groups = []
    for picture in iter_pictures(path):
        found = described.get(picture)
        caption = (found.caption if found else "") or caption_beside(picture, notes)
        licence = found.licence if found else ""
        groups.append(
            ReferenceGroup(
                picture.name, (GroupPicture(PictureSource(picture), caption, licence),), target=0
            )
        )
    return groups


def _of_annotations(path: Path, file: Path, notes: list[str]) -> list[ReferenceGroup]:
    """The first caption of each picture counts."""
    content = read_json(file, _LARGEST_ANNOTATIONS, "list of captions")
    folder = path / file.stem.removeprefix("captions_")
    if not isinstance(content, dict):
        raise EasyRefError(f"{shown(file, 300)} holds no annotations.")
    captions: dict[Any, str] = {}
    licences = {_key(item, "id"): str(item.get("name", "")) for item in _items(content, "licenses")}
    for item in _items(content, "annotations"):
        text = item.get("caption")
        if isinstance(text, str):
            captions.setdefault(_key(item, "image_id"), as_text(text.strip()))
    groups, missing = [], 0
    for item in sorted(_items(content, "images"), key=lambda item: str(item.get("file_name"))):
        caption = captions.get(_key(item, "id"))
        picture = inside(folder, item.get("file_name"), "picture")
        if caption is None or not is_regular(picture):
            missing += 1
            continue
        licence = as_text(licences.get(_key(item, "license"), ""))
        shared = GroupPicture(PictureSource(picture), caption, licence)
        groups.append(ReferenceGroup(picture.stem, (shared,), target=0))
    if missing:
        notes.append(
            f"{missing} pictures of {shown(file, 300)} are left out: they have no caption or are "
            f"not in {shown(folder, 300)}."
        )
    return groups


def _items(content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = content.get(key)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _key(item: dict[str, Any], name: str) -> Any:
    value = item.get(name)
    return value if isinstance(value, (int, str)) else None


def read_dreambooth(path: Path, notes: list[str]) -> list[ReferenceGroup]:
    """A group for each subject, with the prompts of its class.

    Raises:
        EasyRefError: no list of prompts and classes.
    """
    _check_folder(path)
    if not is_regular(path / _PROMPTS_FILE) and (path / "dataset").is_dir():
        path = path / "dataset"
    text = _text_of(path / _PROMPTS_FILE, "list of prompts and classes")
    objects, _, live = text.partition("Live Subject Prompts")
    templates = {False: _PROMPT.findall(objects), True: _PROMPT.findall(live)}
    classes = dict(_CLASS.findall(text.partition("Prompts")[0]))
    classes.pop("subject_name", None)
    if not classes or not all(templates.values()):
        raise EasyRefError(
            f"{shown(path / _PROMPTS_FILE, 300)} names no classes, or no prompts for objects and "
            "live subjects."
        )
    groups = []
    for folder in entries(path):
        if not folder.is_dir():
            continue
        if folder.name not in classes:
            notes.append(
                f"{_PROMPTS_FILE} names no class for {shown(folder.name)}; it is left out."
            )
            continue
        kind = classes[folder.name]
        prompts = (_filled(template, kind) for template in templates[kind in _LIVE])
        pictures = tuple(GroupPicture(PictureSource(p)) for p in iter_pictures(folder))
        groups.append(
            ReferenceGroup(
                folder.name,
                pictures,
                kind="live" if kind in _LIVE else "object",
                prompts=tuple(prompts),
            )
        )
    return groups


def _filled(template: str, kind: str) -> str:
    """A prompt without the rare word that stands for the subject in DreamBooth itself."""
    return " ".join(template.replace("{0}", "").replace("{1}", kind).split())


def read_multibanana(path: Path, notes: list[str]) -> list[ReferenceGroup]:
    """A group for each set of references and its instruction."""
    _check_folder(path)
    if (path / "data").is_dir():
        path = path / "data"
    groups = []
    for task in entries(path):
        if not task.is_dir():
            continue
        numbered: dict[str, list[tuple[int, Path]]] = defaultdict(list)
        for entry in entries(task):
            match = _SET_PICTURE.fullmatch(entry.stem)
            if match and is_picture(entry):
                numbered[match[1]].append((int(match[2][:9]), entry))
        for name, found in numbered.items():
            prompt = task / f"{name}_prompt.txt"
            try:
                prompts = (_text_of(prompt, "prompt"),)
            except EasyRefError as error:
                notes.append(f"The set {shown(f'{task.name}/{name}')} is left out. {error}")
                continue
            pictures = tuple(GroupPicture(PictureSource(picture)) for _, picture in sorted(found))
            groups.append(
                ReferenceGroup(f"{task.name}/{name}", pictures, kind=task.name, prompts=prompts)
            )
    return groups


def _text_of(path: Path, what: str) -> str:
    try:
        return read_bytes(path, what=what).decode("utf-8-sig").strip()
    except UnicodeError:
        raise EasyRefError(f"{shown(path, 300)} is no text in UTF-8.") from None


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise EasyRefError(f"There is no folder {shown(path, 300)}.")
