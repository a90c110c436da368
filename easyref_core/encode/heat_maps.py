"""Heat maps over the references: how much attention each part of a picture gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..errors import EasyRefError
from .inspection import Inspection, PictureShare, percent

# Nodes show cards at a quarter of this size, side by side, so the share is in large type.
SIDE = 512
FOOTER = 132
MARGIN = 16

_BACKGROUND = (38, 40, 46)
_TEXT = (236, 238, 242)
_FAINT_TEXT = (160, 166, 178)
_LEGEND = 14  # height in pixels, between picture and text
_TOP = 0.99  # quantile at the top of the scale, so that a single position does not set it

# Dark violet over red to light yellow, sRGB. Lightness rises evenly: it reads in grey too.
_COLOURS = (
    (22, 2, 69),
    (63, 6, 98),
    (113, 11, 111),
    (165, 18, 107),
    (212, 47, 87),
    (247, 90, 51),
    (252, 150, 65),
    (253, 199, 108),
    (254, 241, 160),
)


def draw_heat_maps(inspection: Inspection, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """One card of `SIDE` x `SIDE + FOOTER` pixels a reference. All share one scale of colours.

    Args:
        pictures: the references themselves, in order.

    Raises:
        EasyRefError: another number of pictures than were inspected.
    """
    if len(pictures) != len(inspection.pictures):
        raise EasyRefError(
            f"There are {len(pictures)} pictures, but {len(inspection.pictures)} references were "
            "inspected. Give the pictures of that group."
        )
    heat = torch.cat([picture.heat.flatten() for picture in inspection.pictures])
    top = float(heat.quantile(_TOP))
    pairs = enumerate(zip(pictures, inspection.pictures, strict=True), start=1)
    return [_card(picture, share, n, top, inspection) for n, (picture, share) in pairs]


def _card(
    picture: Image.Image, share: PictureShare, number: int, top: float, inspection: Inspection
) -> Image.Image:
    card = Image.new("RGB", (SIDE, SIDE + FOOTER), _BACKGROUND)
    room = SIDE - 2 * MARGIN
    scale = min(room / picture.width, room / picture.height)
    width, height = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    map_ = overlay(picture.resize((width, height), Image.Resampling.LANCZOS), share.heat, top)
    card.paste(map_, ((SIDE - width) // 2, MARGIN + (room - height) // 2))
    ramp = torch.linspace(0, 1, room)[None].expand(_LEGEND, -1) ** 2  # undoes the square root
    grey = Image.new("RGB", (room, _LEGEND), (190, 190, 190))
    card.paste(overlay(grey, ramp, 1.0), (MARGIN, SIDE))

    draw = ImageDraw.Draw(card)
    large, medium, small = (ImageFont.load_default(size) for size in (72, 36, 26))
    middle, right = SIDE + (FOOTER + _LEGEND) // 2, SIDE - MARGIN
    draw.text((MARGIN, middle), percent(share.share), _TEXT, large, "lm")
    room -= MARGIN + draw.textlength(percent(share.share), large)
    name = _shortened(f"{number}. {PurePosixPath(share.name).name}", medium, room)
    draw.text((right, middle - 20), name, _TEXT, medium, "rm")
    among = _shortened(f"{inspection.among_pictures(share)} of pictures", small, room)
    draw.text((right, middle + 22), among, _FAINT_TEXT, small, "rm")
    return card


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, cut off where it is wider than so many pixels."""
    if font.getlength(text) <= room:
        return text
    lengths = range(len(text), -1, -1)
    return text[: next(n for n in lengths if font.getlength(text[:n] + "…") <= room)] + "…"


def overlay(picture: Image.Image, heat: torch.Tensor, top: float) -> Image.Image:
    """The picture in grey, coloured by heat [rows, columns] from 0 to `top`.

    The colour's strength follows the square root of the heat, as attention has a long tail.
    """
    size = (picture.height, picture.width)
    smooth = F.interpolate(heat[None, None].float(), size, mode="bicubic")[0, 0]
    level = (smooth / top).clamp(0, 1).sqrt() if top > 0 else torch.zeros_like(smooth)
    grey = _pixels(picture.convert("L").convert("RGB"))
    # Dim, so that only heat is bright; the colour keeps light and dark of the picture.
    plain = 0.34 * grey + 0.12 * _pixels(picture)
    lit = colours(level) * (0.55 + 0.6 * grey)
    mixed = plain.lerp(lit, (0.15 + 0.6 * level)[..., None])
    return Image.fromarray((mixed.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), "RGB")


def colours(levels: torch.Tensor) -> torch.Tensor:
    """[H, W] levels 0 to 1 -> [H, W, 3] sRGB 0 to 1."""
    table = torch.tensor(_COLOURS) / 255
    place = levels * (len(table) - 1)
    below = place.long().clamp(max=len(table) - 2)
    return table[below].lerp(table[below + 1], (place - below)[..., None])


def _pixels(picture: Image.Image) -> torch.Tensor:
    """[H, W, 3] 0 to 1"""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
