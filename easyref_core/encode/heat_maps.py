"""Heat maps over the references: which parts of each picture the reference tokens looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePosixPath

import torch
from PIL import Image, ImageDraw, ImageFont

from .inspection import Inspection, PictureShare, percent

# Cards are seen at a quarter of this size, side by side on the node: the share is written large.
SIDE = 512
FOOTER = 132
MARGIN = 16

_GROUND = (38, 40, 46)
_TEXT = (236, 238, 242)
_SOFT = (160, 166, 178)
_LEGEND = 14  # pixels high, between picture and text
_BRIGHTEST = 0.99  # of all places, this share lies below the top of the scale: one must not rule


def draw_heat_maps(inspection: Inspection, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """One card of `SIDE` x `SIDE + FOOTER` pixels a reference. All share one scale of colours.

    Args:
        pictures: the references themselves, in order.
    """
    every = torch.cat([picture.heat.flatten() for picture in inspection.pictures])
    top = float(every.quantile(_BRIGHTEST))
    total = inspection.all_pictures
    return [
        _card(picture, share, number, top, total)
        for number, (picture, share) in enumerate(
            zip(pictures, inspection.pictures, strict=True), start=1
        )
    ]


def _card(
    picture: Image.Image, share: PictureShare, number: int, top: float, total: float
) -> Image.Image:
    card = Image.new("RGB", (SIDE, SIDE + FOOTER), _GROUND)
    room = SIDE - 2 * MARGIN
    zoom = min(room / picture.width, room / picture.height)
    size = (max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))
    shown = overlay(picture.resize(size, Image.Resampling.LANCZOS), share.heat, top)
    card.paste(shown, ((SIDE - size[0]) // 2, MARGIN + (room - size[1]) // 2))

    draw = ImageDraw.Draw(card)
    big, middle, small = (ImageFont.load_default(size) for size in (72, 36, 26))
    line = SIDE + (FOOTER + _LEGEND) // 2
    among = percent(share.share / total if total > 0 else 0.0)
    draw.text((MARGIN, line), percent(share.share), _TEXT, big, "lm")
    right = SIDE - MARGIN
    room = right - 2 * MARGIN - draw.textlength(percent(share.share), big)
    draw.text(
        (right, line - 20),
        _short(f"{number}. {PurePosixPath(share.name).name}", middle, room),
        _TEXT,
        middle,
        "rm",
    )
    draw.text((right, line + 22), _short(f"{among} of pictures", small, room), _SOFT, small, "rm")
    _legend(card)
    return card


def _legend(card: Image.Image) -> None:
    """The colours from none to most, as they lie over a middle grey."""
    ramp = torch.linspace(0, 1, SIDE - 2 * MARGIN)[None].expand(_LEGEND, -1) ** 2  # no square root
    plain = Image.new("RGB", (SIDE - 2 * MARGIN, _LEGEND), (190, 190, 190))
    card.paste(overlay(plain, ramp, 1.0), (MARGIN, SIDE))


def _short(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, room: float) -> str:
    """The text, cut off where it is wider than so many pixels."""
    if font.getlength(text) <= room:
        return text
    kept = next(n for n in range(len(text), -1, -1) if font.getlength(text[:n] + "…") <= room)
    return text[:kept] + "…"


def overlay(picture: Image.Image, heat: torch.Tensor, top: float) -> Image.Image:
    """The picture in grey, coloured by heat [rows, columns] from 0 to `top`.

    The colour's strength follows the square root of the heat, as attention has a long tail.
    """
    width, height = picture.size
    smooth = torch.nn.functional.interpolate(
        heat[None, None].float(), (height, width), mode="bicubic", align_corners=False
    )[0, 0]
    level = (smooth / top).clamp(0, 1).sqrt() if top > 0 else torch.zeros_like(smooth)
    colours = torch.tensor(colour_scale())[(level * 255).round().long()]  # [H, W, 3]
    grey = _tensor(picture.convert("L").convert("RGB"))
    # Dim, so that only heat is bright; the colour keeps light and dark of the picture.
    plain = 0.34 * grey + 0.12 * _tensor(picture)
    lit = colours * (0.55 + 0.6 * grey)
    strength = (0.15 + 0.6 * level)[..., None]
    mixed = plain * (1 - strength) + lit * strength
    return Image.fromarray((mixed.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), "RGB")


def _tensor(picture: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)


@lru_cache(maxsize=1)
def colour_scale() -> tuple[tuple[float, float, float], ...]:
    """256 colours from dark violet over red to light yellow, sRGB 0..1.

    Lightness rises evenly in OKLab, so equal steps look equal and the scale also reads in grey;
    each colour is about as vivid as sRGB allows.
    """
    return tuple(_vivid(0.2 + 0.75 * i / 255, 285 + 175 * i / 255) for i in range(256))


def _vivid(lightness: float, hue: float) -> tuple[float, float, float]:
    low, high = 0.0, 0.21
    for _ in range(20):
        middle = (low + high) / 2
        if all(-1e-6 <= c <= 1 + 1e-6 for c in _linear_rgb(lightness, middle, hue)):
            low = middle
        else:
            high = middle
    r, g, b = (_encoded(c) for c in _linear_rgb(lightness, low * 0.95, hue))
    return r, g, b


def _linear_rgb(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """OKLCh to linear sRGB (B. Ottosson, "A perceptual color space for image processing")."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _encoded(linear: float) -> float:
    linear = min(max(linear, 0.0), 1.0)
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
