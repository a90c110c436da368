"""Load pictures from files as 8-bit RGB, whatever their mode, and not larger than needed.

Alpha is dropped, not composited, as in the official preprocessing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import ExifTags, Image

from ..errors import EasyRefError
from ..untrusted import escaped, open_regular
from .bounded_file import BoundedFile
from .formats import HEAD_BYTES, READERS, recognise
from .gallery import Crop, crop_pixels
from .tiff import count_numbers

# The MLLM gets at most an area of 1344 x 1344 pixels: more than this only costs memory.
LONGEST_SIDE = 4096
MAX_PIXELS = 2**27  # half a gigabyte as RGB
_MOST_PIXELS_IN_SCANS = 2**26
_ENOUGH = 3072  # pixels of the longest side that are left of a JPEG, which takes few sizes

_MOST_PIXELS = {
    "WebP": 3 * 2**24,  # 8192 x 6144; its decoder holds the picture four times
    "AVIF": 3 * 2**24,
    "JPEG": 2**28,  # is decoded at half the size where it must be
}
_HEADER_BYTES = {
    "WebP": 64_000_000,  # is read whole at once
    "AVIF": 64_000_000,
    "TIFF": 64_000_000,  # is read twice, an editor's layers included
}
_MOST_TILES = 100_000
_MOST_HEADER_BYTES = 16_000_000  # profiles, thumbnails and notes
_MOST_NUMBERS = 400_000  # of a TIFF's header; they become many times as large as Python's
_HEADER_SECONDS = 2.0
_SECONDS = 10.0
_SECONDS_PER_PIXEL = 2e-7
_BYTES_PER_PIXEL = 8  # the most that a format stores
_MOST_EXIF_BYTES = 65_536  # as in JPEG; a longer one can refer to itself until memory ends
_BAND = 2**22  # pixels that are converted at once
_FILTER_ROWS = 3  # of Lanczos, on each side of a row
_NEW_SUBFILE_TYPE, _DNG_VERSION = 254, 50706  # TIFF tags

_TRANSPOSE = {  # undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(
    source: str | Path | BinaryIO,
    name: str | None = None,
    longest: int = LONGEST_SIDE,
    crop: Crop | None = None,
) -> Image.Image:
    """Read a picture file as RGB, upright by its EXIF tag; of an animation, the first frame.

    Args:
        source: a path, or an open file.
        name: for messages; the path by default.
        longest: most pixels of the longest side; a larger picture is reduced, a JPEG while it is
            decoded.
        crop: the part to read, as fractions of the upright picture; None for the whole.

    Raises:
        EasyRefError: missing, no regular file, not a picture or one of a format that is not read,
            damaged, or too large to be decoded.
    """
    name = escaped(str(source) if name is None else name)
    if isinstance(source, (str, Path)):
        with open_regular(source, "picture") as file:
            return _decoded(file, name, longest, crop)
    return _decoded(source, name, longest, crop)


def _decoded(file: BinaryIO, name: str, longest: int, crop: Crop | None) -> Image.Image:
    with decoding(name):
        image = _opened(file, name)
        _reduce_while_decoding(image, min(crop[2:]) if crop else 1.0, longest)
        image.load()
        orientation = _orientation(image)
        box = (0, 0, *image.size)
        if crop is not None:
            size = image.size if orientation < 5 else image.size[::-1]
            box = _stored_box(crop_pixels(crop, *size), orientation, image.size)
        part = _reduced_rgb(image, box, longest, name)
        transpose = _TRANSPOSE.get(orientation)
        return part if transpose is None else part.transpose(transpose)


def _opened(file: BinaryIO, name: str) -> Image.Image:
    """The picture with its header read, to be decoded by `load`.

    Raises:
        EasyRefError: the format is not read, or the picture is too large.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    file.seek(0)
    found = recognise(head)
    if found is None:
        raise EasyRefError(f"{name} is not a picture that can be read. Save it as PNG or JPEG.")
    if not found.readable:
        raise EasyRefError(
            f"{name} is a file of the kind {found.name}, which is not read. Save the picture as "
            "PNG or JPEG."
        )
    if found.name == "TIFF":
        if count_numbers(file) > _MOST_NUMBERS:
            raise _in_pieces(name)
        file.seek(0)
    bounded = BoundedFile(file, name)
    header = _HEADER_BYTES.get(found.name, _MOST_HEADER_BYTES)
    bounded.allow(header, _HEADER_SECONDS)
    try:
        image = READERS[found.name](cast(BinaryIO, bounded))
    except (SyntaxError, IndexError, TypeError, KeyError, EOFError, struct.error):
        raise EasyRefError(
            f"{name} is not a picture that can be read: it begins as {found.name}, but is damaged "
            "or truncated. Save it as PNG or JPEG."
        ) from None
    pixels = image.width * image.height
    most = _MOST_PIXELS.get(found.name, MAX_PIXELS)
    if found.name == "JPEG" and _in_several_scans(image, bounded):
        most = _MOST_PIXELS_IN_SCANS
    if pixels > most:
        raise EasyRefError(
            f"{name} has {image.width} x {image.height} pixels, {pixels / 1e6:,.0f} million; at "
            f"most {most / 1e6:,.0f} million can be decoded. Save it smaller."
        )
    if len(image.tile) > _MOST_TILES:  # type: ignore[attr-defined]
        raise _in_pieces(name)
    if found.name == "TIFF" and _is_raw(image):
        raise EasyRefError(
            f"{name} is a camera's raw file, which is not read. Save the picture as PNG or JPEG."
        )
    bounded.allow(header + _BYTES_PER_PIXEL * pixels, _SECONDS + _SECONDS_PER_PIXEL * pixels)
    return image


def _in_pieces(name: str) -> EasyRefError:
    return EasyRefError(f"{name} lies in too many pieces. Save it again as PNG or JPEG.")


def _in_several_scans(image: Image.Image, file: BoundedFile) -> bool:
    """Whether a JPEG's colours or details lie apart. libjpeg then holds all of it, at any scale.

    Args:
        file: read up to the first scan.
    """
    if image.info.get("progressive"):
        return True
    length = 6 + 2 * len(image.getbands())  # of the header of a scan that has all colours
    file.seek(file.tell() - length)
    return file.read(length)[:2] != length.to_bytes(2, "big")


def _is_raw(image: Image.Image) -> bool:
    """Whether a TIFF file begins with a preview, as those that cameras write."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    kind = tags.get(_NEW_SUBFILE_TYPE, 0)
    return _DNG_VERSION in tags or (isinstance(kind, int) and bool(kind & 1))


def _reduce_while_decoding(image: Image.Image, share: float, longest: int) -> None:
    """Let a JPEG be decoded at a half, a quarter or an eighth of its size.

    Args:
        share: of its sides that is needed.
        longest: pixels of the needed part's longest side that must be left; `_ENOUGH` of more.
    """
    scale = min(longest, _ENOUGH) / share / max(image.size)
    if image.width * image.height > MAX_PIXELS:
        scale = min(scale, 0.5)
    if scale < 1:
        image.draft(None, tuple(max(1, round(side * scale)) for side in image.size))


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn all that Pillow raises while opening and decoding a picture into EasyRefError, except
    MemoryError, which is not the file's fault.
    """
    try:
        yield
    except (EasyRefError, MemoryError):
        raise
    except Exception as error:  # a damaged picture raises anything, RuntimeError and TypeError too
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
            raise EasyRefError(
                f"{name} cannot be read ({error.strerror}). Check its permissions and its disk."
            ) from error
        raise EasyRefError(
            f"{name} cannot be decoded ({type(error).__name__}: {escaped(str(error))}). The file "
            "is damaged or truncated; save it again."
        ) from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded picture; 1 if it has none or one that cannot be read. Only
    that one tag is read: odd values elsewhere do no harm.
    """
    exif = image.info.get("exif", b"")
    if len(exif) > _MOST_EXIF_BYTES:  # the tag stands near the beginning
        image.info["exif"] = exif[:_MOST_EXIF_BYTES]
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises anything, struct.error and TypeError too
        return 1
    return found if found in _TRANSPOSE else 1


def _stored_box(
    box: tuple[int, int, int, int], orientation: int, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a box of the upright picture lies in the picture as it is stored.

    Args:
        box: (left, top, right, bottom).
        size: width and height as stored.
    """
    left, top, right, bottom = box
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
        left, right = size[0] - right, size[0] - left
    if orientation in (3, 4, 6, 7):
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _reduced_rgb(
    image: Image.Image, box: tuple[int, int, int, int], longest: int, name: str
) -> Image.Image:
    """A part of a decoded picture in RGB, no side of it longer than `longest`.

    In bands, as a copy of the whole in another mode can be larger than the picture itself.
    """
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    scale = max(1.0, max(width, height) / longest)
    if scale == 1 and image.mode == "RGB":
        return image.crop(box)
    part = Image.new("RGB", (max(1, round(width / scale)), max(1, round(height / scale))))
    step = height / part.height  # rows of the picture for one of the part
    margin = math.ceil(_FILTER_ROWS * step)
    white = _white(image)
    rows = max(1, round(_BAND / (width * step)))
    for start in range(0, part.height, rows):
        end = min(start + rows, part.height)
        first = max(0, math.floor(start * step) - margin)
        last = min(height, math.ceil(end * step) + margin)
        band = _converted(image.crop((left, top + first, right, top + last)), white, name)
        exact = (0, start * step - first, width, end * step - first)
        size = (part.width, end - start)
        part.paste(band.resize(size, Image.Resampling.LANCZOS, exact, reducing_gap=1), (0, start))
    return part


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert any PIL mode to 8-bit RGB.

    16-bit greys are scaled to 8 bits (PIL's own conversion would clip them to white).

    Raises:
        EasyRefError: the picture has no pixels, or float pixels that are not numbers.
    """
    if image.width == 0 or image.height == 0:
        raise EasyRefError(
            f"{name} has no pixels ({image.width}x{image.height}). Choose another picture."
        )
    return _converted(image, _white(image), name)


def _white(image: Image.Image) -> int:
    """The level that becomes white, in modes of more than 8 bits; 255 in others."""
    if image.mode.startswith("I;"):
        return 65535
    if image.mode == "I":  # holds 16-bit files, and 8-bit pictures
        return 65535 if image.getextrema()[1] > 255 else 255
    if image.mode == "F":
        return 1 if image.getextrema()[1] <= 1 else 255
    return 255


def _converted(image: Image.Image, white: int, name: str) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    levels = torch.from_numpy(np.array(image, dtype=np.float32)) * 255 / white
    if image.mode == "F" and not torch.isfinite(levels).all():
        raise EasyRefError(f"{name} holds pixels that are not numbers (NaN or infinite).")
    pixels = levels.round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy(), "L").convert("RGB")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the picture's name before EasyRefErrors raised inside."""
    try:
        yield
    except EasyRefError as error:
        raise EasyRefError(f"{escaped(name)}: {error}") from error
