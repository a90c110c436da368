"""The gallery's files: pictures inside ComfyUI's own folders, and nothing outside them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import folder_paths

from ...easyref_core.encode.group import Reference
from ...easyref_core.errors import EasyRefError
from ...easyref_core.pictures.formats import is_picture
from ...easyref_core.pictures.gallery import (
    Crop,
    GalleryPicture,
    checked_file,
    parse_gallery,
    split_folder,
)
from ...easyref_core.pictures.loading import open_picture
from ...easyref_core.untrusted import inside, is_regular, shown

MAX_LISTED = 500
MAX_FOLDERS = 200
MAX_PICTURES = 1000  # more than the MLLM can take

_FOLDER_DEPTH = 4
_NAMED = 10
_REMEMBERED = 20_000  # files


def picture_path(file: str) -> Path:
    """Path of a file of the gallery, which need not exist.

    Raises:
        EasyRefError: the name, or a link on the way, leads out of its folder.
    """
    name, folder = split_folder(checked_file(file, "A picture of the gallery"))
    try:
        return inside(_folder(folder), name, "picture")
    except EasyRefError:
        raise EasyRefError(
            f"The gallery's picture {shown(file)} leads out of ComfyUI's {folder} folder through a "
            "link. Copy the picture itself into the input folder."
        ) from None


def missing_files(files: Iterable[str]) -> list[str]:
    """Those that do not exist, without repetitions.

    Raises:
        EasyRefError: see `picture_path`.
    """
    return [file for file in dict.fromkeys(files) if not is_regular(picture_path(file))]


def checked_gallery(text: str) -> tuple[GalleryPicture, ...]:
    """The pictures of a gallery, whose files all exist.

    Raises:
        EasyRefError: see `parse_gallery` and `picture_path`; too many, or files are missing (all
            named).
    """
    pictures = parse_gallery(text)
    if len(pictures) > MAX_PICTURES:
        raise EasyRefError(
            f"The gallery has {len(pictures):,} pictures; {MAX_PICTURES:,} are the most. Remove "
            "some."
        )
    missing = missing_files(picture.file for picture in pictures)
    if missing:
        folders = sorted({str(_folder(split_folder(file)[1])) for file in missing})
        named = ", ".join(shown(file) for file in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise EasyRefError(
            f"{len(missing)} of the gallery's pictures are missing in {' and '.join(folders)}: "
            f"{named}{more}. Put them there under these names, or remove them from the gallery."
        )
    return pictures


def gallery_references(text: str, weight: float) -> tuple[Reference, ...]:
    """The gallery's pictures as references: cropped, upright and at most as large as needed.

    Args:
        weight: multiplies each picture's own weight.

    Raises:
        EasyRefError: see `checked_gallery` and `open_picture`.
    """
    references = []
    for picture in checked_gallery(text):
        comfy.model_management.throw_exception_if_processing_interrupted()
        path = picture_path(picture.file)
        image = open_picture(path, picture.file, crop=picture.crop)
        references.append(Reference(image, picture.weight * weight, picture.file))
    return tuple(references)


def gallery_stamps(text: str) -> list[tuple[str, str]]:
    """(name, stamp) of each file. Empty if the gallery cannot be used: running the node gives the
    error.
    """
    try:
        found = [(picture.file, stamp(picture.file)) for picture in parse_gallery(text)]
    except EasyRefError:
        return []
    return found if all(stamp for _, stamp in found) else []


def list_pictures(folder: str) -> list[str]:
    """The picture files of a folder of the input folder ("" for itself), in natural order.

    Raises:
        EasyRefError: there is no such folder, it leads outside, or it holds no picture.
    """
    base = _folder("input")
    path = picture_path(folder) if folder.strip("/\\ ") else base
    # Of an impossible name, Path.is_dir would raise.
    if split_folder(folder)[1] != "input" or not os.path.isdir(path):
        raise EasyRefError(
            f"There is no folder {shown(folder)} in {base}. Refresh the page to see the folders "
            "there."
        )
    pictures = sorted(_pictures_in(path), key=_natural)
    if not pictures:
        raise EasyRefError(
            f"The folder {shown(folder or 'input')} holds no picture. Put PNG, JPEG or WebP files "
            "there."
        )
    return [picture.relative_to(base).as_posix() for picture in pictures]


def list_folders() -> list[tuple[str, int]]:
    """(folder, number of its pictures) of those folders that hold pictures; "" is the input folder
    itself.
    """
    base = _folder("input")
    folders: list[tuple[str, int]] = []
    for path in _folders(base, _FOLDER_DEPTH):
        count = sum(1 for _ in _pictures_in(path))
        if count:
            folders.append(("" if path == base else path.relative_to(base).as_posix(), count))
        if len(folders) == MAX_FOLDERS:
            break
    return folders


def thumbnail(file: str, side: int, crop: Crop | None = None) -> bytes:
    """A small WebP of a picture as it is encoded: upright, without alpha, cropped.

    Raises:
        EasyRefError: see `picture_path` and `open_picture`.
    """
    image = open_picture(picture_path(file), file, side, crop)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()


def stamp(file: str) -> str:
    """Changes when the file does; empty if there is no such file in its folder."""
    try:
        path = picture_path(file)
        state = path.stat()
    except (EasyRefError, OSError, ValueError):
        return ""
    numbers = (state.st_mtime_ns, state.st_size, state.st_ino, state.st_ctime_ns)
    return "-".join(f"{number:x}" for number in numbers) if is_regular(path) else ""


def _folder(kind: str) -> Path:
    """Path of one of ComfyUI's folders: "input", "output" or "temp"."""
    return Path(folder_paths.get_directory_by_type(kind))


@lru_cache(_REMEMBERED)
def _is_picture(path: str, *_: int) -> bool:
    """Whether a file holds a picture.

    Args:
        _: numbers that change with the file.
    """
    return is_picture(path)


def _pictures_in(folder: Path) -> Iterator[Path]:
    """Picture files of a folder, without links that lead outside."""
    base = _folder("input").resolve()
    try:
        children = list(os.scandir(folder))
    except OSError:
        return
    for child in children:
        path = folder / child.name
        try:
            if child.name.startswith(".") or not child.is_file():
                continue
            if child.is_symlink() and not path.resolve().is_relative_to(base):
                continue
            state = child.stat()
        except (OSError, RuntimeError):  # links in a circle
            continue
        if _is_picture(str(path), state.st_mtime_ns, state.st_size, state.st_ino):
            yield path


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """A folder and those up to `depth` levels below it, without links."""
    yield folder
    if depth == 0:
        return
    try:
        children = sorted(os.scandir(folder), key=lambda child: _natural(Path(child.path)))
    except OSError:
        return
    for child in children:
        if child.is_dir(follow_symlinks=False) and not child.name.startswith("."):
            yield from _folders(Path(child.path), depth - 1)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts "a 2.png" before "a 10.png"."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]
