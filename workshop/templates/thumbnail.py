"""Draws a template's thumbnail: references, an arrow, the result, title and caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from easyref_core.files import writing

from ..demo.canvas import Colour

_SIZE = (768, 576)  # coordinates below are in this canvas
_FINISHED = (640, 480)
_QUALITY = 84
_OVERSAMPLING = 2
_TOP: Colour = (233, 244, 241)
_BOTTOM: Colour = (251, 240, 226)
_INK: Colour = (44, 42, 48)
_ACCENT: Colour = (34, 139, 141)
_RADIUS = 14
_BORDER = 7


# Number of references -> centre, longer side and angle of each; later ones lie on top.
_PLACES = {
    2: (((124, 150), 184, 6.0), ((248, 314), 200, -4.0)),
    3: (((118, 140), 172, 7.0), ((276, 158), 150, -6.0), ((186, 322), 196, 3.0)),
    4: (
        ((108, 126), 150, 5.0),
        ((280, 128), 150, -5.0),
        ((106, 324), 150, -4.0),
        ((278, 322), 150, 5.0),
    ),
}


def draw_thumbnail(
    references: Sequence[Image.Image], result: Image.Image, title: str, caption: str
) -> Image.Image:
    """Reference cards on the left, an arrow, the result on the right, two lines of text below.

    Args:
        references: two to four.
    """
    scale = _OVERSAMPLING
    width, height = (side * scale for side in _SIZE)
    gradient = Image.new("RGB", (1, 2))
    gradient.putdata([_TOP, _BOTTOM])
    sheet = gradient.resize((width, height), Image.Resampling.BILINEAR)
    places = (*_PLACES[len(references)], ((597, 238), 288, 0.0))
    for picture, (centre, side, angle) in zip((*references, result), places, strict=True):
        card = _card(picture, side * scale)
        _drop(sheet, card, (centre[0] * scale, centre[1] * scale), angle)
    draw = ImageDraw.Draw(sheet)
    y, left, right = 238 * scale, 376 * scale, 408 * scale
    draw.line((left, y, right, y), _ACCENT, 8 * scale)
    tip = 16 * scale
    draw.polygon([(right, y - tip), (right + tip * 1.3, y), (right, y + tip)], _ACCENT)
    draw.ellipse((left - 4 * scale, y - 4 * scale, left + 4 * scale, y + 4 * scale), _ACCENT)
    for text, size, x, base in (
        (title, 42, 40, 488),
        (caption, 24, 42, 540),
    ):
        font = ImageFont.load_default(size * scale)
        draw.text((x * scale, base * scale), text, _INK, font, anchor="lm")
    return sheet.resize(_FINISHED, Image.Resampling.LANCZOS)


def _card(picture: Image.Image, longer: int) -> Image.Image:
    """A picture with a white border and round corners."""
    border, radius = _BORDER * _OVERSAMPLING, _RADIUS * _OVERSAMPLING
    width, height = (round(side * longer / max(picture.size)) for side in picture.size)
    card = Image.new("RGBA", (width + 2 * border, height + 2 * border), (255, 255, 255, 255))
    inner = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    mask = Image.new("L", inner.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, width - 1, height - 1), radius // 2, 255)
    card.paste(inner, (border, border), mask)
    outer = Image.new("L", card.size, 0)
    box = (0, 0, card.width - 1, card.height - 1)
    ImageDraw.Draw(outer).rounded_rectangle(box, radius, 255)
    card.putalpha(outer)
    return card


def _drop(sheet: Image.Image, card: Image.Image, centre: tuple[int, int], angle: float) -> None:
    """Lay a card on the sheet, turned, with a soft shadow."""
    turned = card.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x, y = centre[0] - turned.width // 2, centre[1] - turned.height // 2
    blur = 12 * _OVERSAMPLING
    shadow = Image.new("L", (turned.width + 4 * blur, turned.height + 4 * blur), 0)
    shadow.paste(turned.getchannel("A").point(lambda a: a * 60 // 255), (2 * blur, 2 * blur))
    shadow = shadow.filter(ImageFilter.GaussianBlur(blur / 2))
    sheet.paste((60, 50, 60), (x - 2 * blur, y - 2 * blur + blur // 2), shadow)
    sheet.paste(turned, (x, y), turned)


def write_thumbnail(
    references: Sequence[Image.Image],
    result: Image.Image,
    title: str,
    caption: str,
    target: Path,
) -> Path:
    """Draw a thumbnail into a JPEG file; see `draw_thumbnail`.

    Raises:
        EasyRefError: the file cannot be written.
    """
    drawn = draw_thumbnail(references, result, title, caption)
    with writing(target):
        drawn.save(target, quality=_QUALITY, optimize=True, progressive=True)
    return target
