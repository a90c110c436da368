"""The gallery's files: pictures inside ComfyUI's input folder, and nothing outside it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import comfy.model_management
import folder_paths
from PIL import Image

from ...easyref_core.encode.group import Reference
from ...easyref_core.errors import EasyRefError
from ...easyref_core.pictures.gallery import (
    Crop,
    GalleryPicture,
    checked_file,
    crop_pixels,
    parse_gallery,
)
from ...easyref_core.pictures.loading import decoding, open_picture, to_rgb, upright

PICTURE_FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
MAX_LISTED = 500
MAX_FOLDERS = 200

# The MLLM gets at most an area of 1344 x 1344 pixels: more than this only costs memory.
_LONGEST_SIDE = 4096
_FOLDER_DEPTH = 4
_NAMED = 10


def picture_path(file: str) -> Path:
    """Path of a file of the gallery, which need not exist.

    Raises:
        EasyRefError: the name, or a link on the way, leads out of the input folder.
    """
    base = _input_folder()
    path = base / checked_file(file, "A picture of the gallery")
    try:
        inside = path.resolve().is_relative_to(base.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, names too long
        inside = False
    if not inside:
        raise EasyRefError(
            f"The gallery's picture {file!r} leads out of ComfyUI's input folder through a link. "
            "Copy the picture itself into the input folder."
        )
    return path


def missing_files(files: Iterable[str]) -> list[str]:
    """Those that do not exist, without repetitions.

    Raises:
        EasyRefError: see `picture_path`.
    """
    return [file for file in dict.fromkeys(files) if not _is_file(picture_path(file))]


def checked_gallery(text: str) -> tuple[GalleryPicture, ...]:
    """The pictures of a gallery, whose files all exist.

    Raises:
        EasyRefError: see `parse_gallery` and `picture_path`; files are missing (all named).
    """
    pictures = parse_gallery(text)
    missing = missing_files(picture.file for picture in pictures)
    if missing:
        named = ", ".join(repr(file) for file in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise EasyRefError(
            f"{len(missing)} of the gallery's pictures are missing in {_input_folder()}: {named}"
            f"{more}. Put them there under these names, or remove them from the gallery."
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
        image = _cropped(open_picture(picture_path(picture.file), picture.file), picture.crop)
        shrunk = shrink(image, _LONGEST_SIDE)
        references.append(Reference(shrunk, picture.weight * weight, picture.file))
    return tuple(references)


def gallery_stamps(text: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of each file. Empty if the gallery cannot be used: running the
    node gives the error.
    """
    try:
        paths = [(picture.file, picture_path(picture.file)) for picture in parse_gallery(text)]
        stats = [(file, path.stat()) for file, path in paths]
    except (EasyRefError, OSError):
        return []
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def shrink(image: Image.Image, longest: int) -> Image.Image:
    """The picture in its aspect ratio, its longest side at most so many pixels."""
    if max(image.size) <= longest:
        return image
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def list_pictures(folder: str) -> list[str]:
    """The picture files of a folder of the input folder ("" for itself), in natural order.

    Raises:
        EasyRefError: there is no such folder, it leads outside, or it holds no picture.
    """
    base = _input_folder()
    path = picture_path(folder) if folder.strip("/\\ ") else base
    if not path.is_dir():
        raise EasyRefError(
            f"There is no folder {folder!r} in {base}. Refresh the page to see the folders there."
        )
    pictures = sorted(_pictures_in(path), key=_natural)
    if not pictures:
        raise EasyRefError(
            f"The folder {folder or 'input'!r} holds no picture. Put PNG, JPEG or WebP files there."
        )
    return [picture.relative_to(base).as_posix() for picture in pictures]


def list_folders() -> list[tuple[str, int]]:
    """(folder, number of its pictures) of those folders that hold pictures; "" is the input folder
    itself.
    """
    base = _input_folder()
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
        EasyRefError: see `picture_path`; not a picture by its name, or unreadable.
    """
    path = picture_path(file)
    if path.suffix.lower() not in PICTURE_FILES:
        raise EasyRefError(f"{file!r} is not a picture by its name.")
    image = shrink(_cropped(_open_reduced(path, file, side, crop), crop), side)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()


def stamp(file: str) -> str:
    """Changes when the file does; empty if there is no such file in the input folder."""
    try:
        path = picture_path(file)
        stat = path.stat()
    except (EasyRefError, OSError):
        return ""
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}" if path.is_file() else ""


def _open_reduced(path: Path, name: str, side: int, crop: Crop | None) -> Image.Image:
    """The upright picture; a JPEG is decoded only as large as a crop of `side` pixels needs."""
    share = min(crop[2:]) if crop else 1.0
    with decoding(repr(name)), Image.open(path) as image:
        scale = min(1.0, side / share / max(image.size))
        image.draft(None, (round(image.width * scale), round(image.height * scale)))
        return to_rgb(upright(image), name)


def _input_folder() -> Path:
    return Path(folder_paths.get_input_directory())


def _cropped(image: Image.Image, crop: Crop | None) -> Image.Image:
    return image if crop is None else image.crop(crop_pixels(crop, *image.size))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # an impossible file name
        return False


def _pictures_in(folder: Path) -> Iterator[Path]:
    """Picture files of a folder, without links that lead outside."""
    base = _input_folder().resolve()
    try:
        children = list(os.scandir(folder))
    except OSError:
        return
    for child in children:
        if Path(child.name).suffix.lower() not in PICTURE_FILES or child.name.startswith("."):
            continue
        path = folder / child.name
        if child.is_file() and (not child.is_symlink() or path.resolve().is_relative_to(base)):
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
