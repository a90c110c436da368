"""Load pictures from files or tensors as 8-bit RGB, whatever their mode.

Alpha is dropped, not composited, as in the official preprocessing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import EasyRefError

_TRANSPOSE = {  # undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read a picture file as RGB, upright by its EXIF tag; of an animation, the first frame.

    Args:
        source: a path, or an open file.
        name: for messages; the path by default.

    Raises:
        EasyRefError: missing, unreadable, truncated, or too large to be decoded safely.
    """
    name = str(source) if name is None else name
    with decoding(name), Image.open(source) as image:
        return to_rgb(upright(image), name)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn all that Pillow raises while opening and decoding a picture into EasyRefError, except
    MemoryError, which is not the file's fault.
    """
    try:
        yield
    except (EasyRefError, MemoryError):
        raise
    except FileNotFoundError:
        raise EasyRefError(f"There is no picture {name}. Check the name and the folder.") from None
    except IsADirectoryError:
        raise EasyRefError(f"{name} is a folder. Name the pictures in it.") from None
    except UnidentifiedImageError:
        raise EasyRefError(
            f"{name} is not a picture that can be read. Save it as PNG or JPEG."
        ) from None
    except Image.DecompressionBombError as error:
        raise EasyRefError(f"{name} is too large to be decoded safely: {error}") from None
    except Exception as error:  # a damaged picture raises anything, RuntimeError and TypeError too
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
            raise EasyRefError(
                f"{name} cannot be read ({error.strerror}). Check its permissions and its disk."
            ) from error
        raise EasyRefError(
            f"{name} cannot be decoded ({type(error).__name__}: {error}). The file is damaged or "
            "truncated; save it again."
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """The decoded picture, transposed by its EXIF orientation; EXIF that cannot be read is ignored.
    Only that one tag is read: odd values elsewhere do no harm.
    """
    image.load()
    try:
        transpose = _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF raises anything, struct.error and TypeError too
        transpose = None
    return image if transpose is None else image.transpose(transpose)


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
    if image.mode.startswith("I"):
        values = _grey_levels(image)
        # Mode I holds 16-bit files too, and 8-bit pictures: there the scale follows the content.
        return _grey_picture(values / 257 if image.mode != "I" or values.max() > 255 else values)
    if image.mode == "F":
        values = _grey_levels(image)
        if not torch.isfinite(values).all():
            raise EasyRefError(f"{name} holds pixels that are not numbers (NaN or infinite).")
        return _grey_picture(values * 255 if values.max() <= 1 else values)
    return image.convert("RGB")


def _grey_levels(image: Image.Image) -> torch.Tensor:
    """Grey levels [H, W] in float32."""
    return torch.from_numpy(np.array(image, dtype=np.float32))


def _grey_picture(values: torch.Tensor) -> Image.Image:
    pixels = values.round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy(), "L").convert("RGB")


def tensor_to_picture(pixels: torch.Tensor, name: str) -> Image.Image:
    """One float picture [H, W, C] in 0..1 (ComfyUI's IMAGE without its batch) as RGB.

    Rounds to the nearest level, so an 8-bit picture comes back bit for bit.

    Raises:
        EasyRefError: no pixels, no colour channel, or values that are not numbers.
    """
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise EasyRefError(
            f"{name} has shape {list(pixels.shape)}; a picture has height, width and colours, "
            "none of them 0. Choose another picture."
        )
    channels = pixels.shape[-1]
    if channels not in (1, 2, 3, 4):
        raise EasyRefError(
            f"{name} has {channels} channels (shape {list(pixels.shape)}); grey, RGB and RGBA "
            "pictures can be read."
        )
    pixels = pixels.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        bad = int((~torch.isfinite(pixels)).sum())
        raise EasyRefError(
            f"{name} holds {bad} values that are not numbers (NaN or infinite). "
            "The node that made it failed, often a VAE in half precision; check it."
        )
    colours = pixels[..., :3] if channels >= 3 else pixels[..., :1].expand(-1, -1, 3)
    levels = (colours * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.contiguous().numpy(), "RGB")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the picture's name before EasyRefErrors raised inside."""
    try:
        yield
    except EasyRefError as error:
        raise EasyRefError(f"{name}: {error}") from error
