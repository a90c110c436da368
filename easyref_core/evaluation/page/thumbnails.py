"""Small copies of many pictures that together stay below a number of bytes."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, features

from ...errors import EasyRefError
from ...pictures.loading import open_picture
from ...untrusted import escaped

LEVELS = (  # pixels of the longest side and quality, best first
    *((448, 82), (384, 80), (320, 78), (256, 76), (224, 75)),
    *((192, 74), (160, 72), (144, 70), (128, 68)),
)
_SAMPLE = 24  # pictures by which the size of all is foretold
_SLACK = 1.1  # of what is foretold
_THREADS = 8


@dataclass(frozen=True)
class Thumbnail:
    """A small picture, as the text of an `img` element's source."""

    source: str
    width: int
    height: int


@dataclass(frozen=True)
class Thumbnails:
    """
    Attributes:
        found: path -> its thumbnail; pictures that could not be read are absent.
        unreadable: path -> why.
        longest: pixels of the longest side; 0 where there is no picture.
    """

    found: dict[Path, Thumbnail]
    unreadable: dict[Path, str]
    longest: int = 0

    @property
    def bytes(self) -> int:
        return sum(len(thumbnail.source) for thumbnail in self.found.values())


def make_thumbnails(
    choose: Callable[[int], Mapping[Path, float]],
    counts: Sequence[int],
    limit: Callable[[int], int],
) -> tuple[Thumbnails, int]:
    """The largest thumbnails that fit; of fewer items where even the smallest do not.

    Args:
        choose: the pictures that so many items need, and which share of the largest size each.
        counts: how many items may be shown, most first.
        limit: characters that the sources of so many items may have together.

    Returns:
        The thumbnails, and how many items they are for; none where nothing fits.
    """
    opened: dict[Path, Image.Image | str] = {}  # the sampled ones, which are encoded at every level

    def sampled(path: Path) -> Image.Image | str:
        if path not in opened:
            opened[path] = _open(path)
        return opened[path]

    for count in counts:
        shares = choose(count)
        paths, most = list(shares), limit(count)
        sample = {path: shares[path] for path in paths[:: max(1, len(paths) // _SAMPLE)]}
        for level in LEVELS:
            tried = _at_level(sample, level, sampled)
            if tried.bytes * len(paths) * _SLACK <= most * max(1, len(sample)):
                whole = len(sample) == len(paths)
                made = tried if whole else _at_level(shares, level, _open)
                if made.bytes <= most:
                    return made, count
    return Thumbnails({}, {}), 0


def _at_level(
    shares: Mapping[Path, float],
    level: tuple[int, int],
    open_one: Callable[[Path], Image.Image | str],
) -> Thumbnails:
    """Thumbnails of all pictures at one level."""
    longest, quality = level

    def make(path: Path) -> Thumbnail | str:
        picture = open_one(path)
        if isinstance(picture, str):
            return picture
        return encode(picture, round(longest * shares[path]), quality)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        made = dict(zip(shares, pool.map(make, shares), strict=True))
    return Thumbnails(
        {path: found for path, found in made.items() if isinstance(found, Thumbnail)},
        {path: why for path, why in made.items() if isinstance(why, str)},
        longest,
    )


def _open(path: Path) -> Image.Image | str:
    """A picture, not larger than its largest thumbnail; or why it cannot be read."""
    try:
        picture = open_picture(path)
    except EasyRefError as error:
        return str(error)
    except MemoryError:
        return f"{escaped(str(path))} needs more memory than there is."
    picture.thumbnail((LEVELS[0][0],) * 2, Image.Resampling.LANCZOS)
    return picture


def encode(picture: Image.Image, longest: int, quality: int) -> Thumbnail:
    """
    Args:
        picture: RGB.
        longest: pixels; a smaller picture keeps its size.
    """
    picture = picture.copy()
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    form, kind = ("WEBP", "webp") if features.check("webp") else ("JPEG", "jpeg")
    buffer = BytesIO()
    picture.save(buffer, form, quality=quality)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/{kind};base64,{text}", *picture.size)
