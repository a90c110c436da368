"""What a file holds, told by how it begins, never by its name's ending."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ..errors import EasyRefError
from ..untrusted import open_regular

HEAD_BYTES = 512  # as much as `recognise` looks at

# Pillow reads more, with decoders that start other programs (PostScript) or that hardly anyone
# tests. Its Image.open also refuses by a size that any other program in the process can change.
READERS: dict[str, type[Image.Image]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
try:
    from PIL import AvifImagePlugin
except ImportError:  # before Pillow 11.3
    pass
else:
    if AvifImagePlugin.SUPPORTED:
        READERS["AVIF"] = AvifImagePlugin.AvifImageFile

_SIGNATURES = (
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("WebP", 8, b"WEBP"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("Canon raw", 0, b"II*\0\x10\0\0\0CR"),
    ("TIFF", 0, b"II*\0"),
    ("TIFF", 0, b"MM\0*"),
    ("TIFF", 0, b"II+\0"),
    ("TIFF", 0, b"MM\0+"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 0, b"\0\0\0\x0cJXL "),
    ("JPEG 2000", 0, b"\0\0\0\x0cjP  "),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("Photoshop", 0, b"8BPS"),
    ("PDF", 0, b"%PDF"),
    ("PostScript", 0, b"%!PS"),
    ("PostScript", 0, b"\xc5\xd0\xd3\xc6"),
    ("icon", 0, b"\0\0\1\0"),
    ("OpenEXR", 0, b"v/1\x01"),
    ("Radiance HDR", 0, b"#?RADIANCE"),
    ("WebM video", 0, b"\x1aE\xdf\xa3"),
)
_PPM = re.compile(rb"P[1-6]\s+[\d#]")
_BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}  # bytes
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        name: as its users call it, such as "HEIC".
        readable: whether it can be a reference.
    """

    name: str
    readable: bool


def recognise(head: bytes) -> Format | None:
    """The format of a file that begins like this; None if it is not known.

    Args:
        head: the first `HEAD_BYTES` of the file, or all of a shorter one.
    """
    name = _name(head)
    return Format(name, name in READERS) if name else None


def is_picture(path: str | Path) -> bool:
    """Whether this is a file whose format can be read; it may still be damaged."""
    try:
        with open_regular(path, "picture") as file:
            found = recognise(file.read(HEAD_BYTES))
    except EasyRefError:
        return False
    return found is not None and found.readable


def _name(head: bytes) -> str:
    for name, start, signature in _SIGNATURES:
        if head.startswith(signature, start):
            return name
    if _PPM.match(head):
        return "PPM"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp":
        return _container(head)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (
        text.startswith((b"<?xml", b"<!doctype svg")) and b"<svg" in text
    ):
        return "SVG"
    return "web page" if text.startswith((b"<!doctype html", b"<html")) else ""


def _container(head: bytes) -> str:
    """Of a file of ISO's base media format, which names the brands that can read it."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[start : start + 4] for start in (8, *range(16, end - 3, 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & _HEIF:
        return "HEIC"
    return "Canon raw" if b"crx " in brands else "video"
