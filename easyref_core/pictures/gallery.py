"""The list of pictures that EasyRef References keeps as text in the workflow.

    {"version": 1, "pictures": [{"file": "people/1.png", "weight": 0.5, "crop": [0, 0, 1, 0.5]}]}

Plain values only, so that a shared workflow shows what it needs. Opening the files is not done
here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .. import untrusted
from ..errors import EasyRefError
from ..untrusted import MAX_TEXT_BYTES, kind_of, parse_json, shown

VERSION = 1

Crop = tuple[float, float, float, float]

# As Load Image names a picture of another of ComfyUI's folders: "a.png [output]".
_ANNOTATED = re.compile(r"(.*?) ?\[(input|output|temp)\]", re.DOTALL)
_LONGEST_NAME = 1000  # with its folders
_TOLERANCE = 1e-6  # rounding errors of the browser's fractions
_HOW_TO_FIX = "Correct the text of gallery, or clear it and add the pictures again."


@dataclass(frozen=True)
class GalleryPicture:
    """One picture of the gallery.

    Attributes:
        file: its name inside ComfyUI's input folder, with / between folders; with " [output]" or
            " [temp]" at its end, inside that folder.
        weight: 0 or more; multiplies the weight of the node.
        crop: left, top, width and height of the part that is used, as fractions 0 to 1 of the
            upright picture; None for the whole.
    """

    file: str
    weight: float = 1.0
    crop: Crop | None = None


def parse_gallery(text: str) -> tuple[GalleryPicture, ...]:
    """The pictures of a gallery, in order; none for an empty text.

    Raises:
        EasyRefError: the text is not a gallery, was written by a newer EasyRef, or names a file, a
            weight or a part that cannot be used.
    """
    if not untrusted.text(text, "gallery").strip():
        return ()
    if len(text) > MAX_TEXT_BYTES:
        raise EasyRefError(
            f"The gallery's text is {len(text):,} characters long; {MAX_TEXT_BYTES:,} are the most."
            f" {_HOW_TO_FIX}"
        )
    content = parse_json(text, "The gallery's text")
    if not isinstance(content, dict):
        raise EasyRefError(
            f"The gallery's text holds {kind_of(content)} where an object with version and "
            f"pictures is needed. {_HOW_TO_FIX}"
        )
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise EasyRefError(
            f"The gallery's version is {shown(version)}; it must be a number from 1 to {VERSION}. "
            f"{_HOW_TO_FIX}"
        )
    if version > VERSION:
        raise EasyRefError(
            f"The gallery was saved by a newer EasyRef (version {version} of its text; this one "
            f"reads up to {VERSION}). Update EasyRef for ComfyUI to open this workflow."
        )
    pictures = content.get("pictures")
    if not isinstance(pictures, list):
        raise EasyRefError(
            f"The gallery's pictures are {kind_of(pictures)} where a list is needed. {_HOW_TO_FIX}"
        )
    return tuple(_picture(entry, number) for number, entry in enumerate(pictures, start=1))


def crop_pixels(crop: Crop, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop in whole pixels, at least one each way."""
    x, y, w, h = crop
    left = min(round(x * width), width - 1)
    top = min(round(y * height), height - 1)
    right = min(max(round((x + w) * width), left + 1), width)
    bottom = min(max(round((y + h) * height), top + 1), height)
    return left, top, right, bottom


def split_folder(file: str) -> tuple[str, str]:
    """A file's name, and which of ComfyUI's folders holds it: "input", "output" or "temp"."""
    found = _ANNOTATED.fullmatch(file)
    return (found[1], found[2]) if found else (file, "input")


def checked_file(file: Any, where: str) -> str:
    """A file name as the gallery stores it: inside its folder, with / between folders.

    Args:
        where: the picture, for messages.

    Raises:
        EasyRefError: no name, or one that leads out of its folder.
    """
    if not isinstance(file, str) or not file.strip():
        raise EasyRefError(
            f"{where} has {shown(file)} as its file; it must be the name of a picture in "
            f"ComfyUI's input folder. {_HOW_TO_FIX}"
        )
    if len(file) > _LONGEST_NAME:
        raise EasyRefError(
            f"{where} is {shown(file)}, a name of {len(file):,} characters; no file can have it. "
            f"{_HOW_TO_FIX}"
        )
    name, folder = split_folder(file)
    name = name.replace("\\", "/")
    parts = name.split("/")
    if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in parts or "\0" in name:
        raise EasyRefError(
            f"{where} is {shown(file)}, which leads out of ComfyUI's {folder} folder. Copy the "
            "picture into the input folder and add it again."
        )
    plain = "/".join(part for part in parts if part not in ("", "."))
    if not plain:
        raise EasyRefError(
            f"{where} is {shown(file)}, which names a folder. Name the pictures in it."
        )
    return plain if folder == "input" else f"{plain} [{folder}]"


def checked_crop(crop: Any, where: str) -> Crop | None:
    """A part of a picture; None for the whole.

    Raises:
        EasyRefError: not four numbers, or not inside the picture.
    """
    if crop is None:
        return None
    if not isinstance(crop, list) or len(crop) != 4:
        raise EasyRefError(
            f"{where}: crop is {shown(crop)}; it must be four numbers: left, top, width and "
            f"height as fractions from 0 to 1. {_HOW_TO_FIX}"
        )
    sides = ("left", "top", "width", "height")
    x, y, w, h = (
        untrusted.number(value, f"{where}: {side} of crop", hint=_HOW_TO_FIX)
        for value, side in zip(crop, sides, strict=True)
    )
    inside = min(x, y) >= -_TOLERANCE and max(x + w, y + h) <= 1 + _TOLERANCE
    if not inside or w <= 0 or h <= 0:
        raise EasyRefError(
            f"{where}: crop is {x:g}, {y:g}, {w:g}, {h:g}, which is not a part of the picture. "
            "Left and top must be 0 or more, width and height above 0, and neither left + width "
            "nor top + height above 1."
        )
    x, y = max(x, 0.0), max(y, 0.0)
    w, h = min(w, 1 - x), min(h, 1 - y)
    return None if (x, y, w, h) == (0, 0, 1, 1) else (x, y, w, h)


def _picture(entry: Any, number: int) -> GalleryPicture:
    where = f"Picture {number} of the gallery"
    if not isinstance(entry, dict):
        raise EasyRefError(
            f"{where} is {kind_of(entry)} where an object with file, weight and crop is "
            f"needed. {_HOW_TO_FIX}"
        )
    file = checked_file(entry.get("file"), where)
    where = f"{where} ({shown(file)})"
    weight = untrusted.number(entry.get("weight", 1.0), f"{where}: weight", low=0, hint=_HOW_TO_FIX)
    return GalleryPicture(file, weight, checked_crop(entry.get("crop"), where))
