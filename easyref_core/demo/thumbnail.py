"""The template's picture in ComfyUI's workflow browser, from the demo's output.

python -m easyref_core.demo.thumbnail     after `make demo`; writes workflows/*.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..errors import EasyRefError
from ..pictures import open_picture
from .canvas import Colour
from .run import OUT
from .workflow import WORKFLOWS

_SIZE = (768, 576)
_OVERSAMPLING = 2
_TOP: Colour = (233, 244, 241)
_BOTTOM: Colour = (251, 240, 226)
_INK: Colour = (44, 42, 48)
_ACCENT: Colour = (34, 139, 141)
_RADIUS = 14
_BORDER = 7


def draw_thumbnail(references: list[Image.Image], result: Image.Image) -> Image.Image:
    """Reference cards on the left, an arrow, the result on the right."""
    scale = _OVERSAMPLING
    width, height = (side * scale for side in _SIZE)
    gradient = Image.new("RGB", (1, 2))
    gradient.putdata([_TOP, _BOTTOM])
    sheet = gradient.resize((width, height), Image.Resampling.BILINEAR)
    first, second, third = references
    # Later ones lie on top.
    for picture, centre, picture_height, angle in (
        (second, (106, 150), 214, 7.0),
        (third, (272, 156), 168, -6.0),
        (first, (188, 326), 196, 3.0),
        (result, (597, 238), 288, 0.0),
    ):
        card = _card(picture, picture_height * scale)
        _drop(sheet, card, (centre[0] * scale, centre[1] * scale), angle)
    draw = ImageDraw.Draw(sheet)
    y, left, right = 238 * scale, 376 * scale, 408 * scale
    draw.line((left, y, right, y), _ACCENT, 8 * scale)
    tip = 16 * scale
    draw.polygon([(right, y - tip), (right + tip * 1.3, y), (right, y + tip)], _ACCENT)
    draw.ellipse((left - 4 * scale, y - 4 * scale, left + 4 * scale, y + 4 * scale), _ACCENT)
    for text, size, x, base in (
        ("EasyRef", 44, 40, 492),
        ("one character, any scene: SDXL with reference pictures", 20, 42, 542),
    ):
        font = ImageFont.load_default(size * scale)
        draw.text((x * scale, base * scale), text, _INK, font, anchor="lm")
    return sheet.resize(_SIZE, Image.Resampling.LANCZOS)


def _card(picture: Image.Image, height: int) -> Image.Image:
    """A picture with a white border and round corners."""
    border, radius = _BORDER * _OVERSAMPLING, _RADIUS * _OVERSAMPLING
    width = round(picture.width * height / picture.height)
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


def write_thumbnail(parts: Path, target: Path) -> Path:
    """Draw the thumbnail from a folder of the demo's parts.

    Raises:
        EasyRefError: a part is missing.
    """
    references = [open_picture(parts / f"reference_{number}.png") for number in (1, 2, 3)]
    draw_thumbnail(references, open_picture(parts / "easyref.png")).save(target, quality=88)
    return target


def main() -> int:
    try:
        print(write_thumbnail(OUT, WORKFLOWS / "easyref_character.jpg"))
    except EasyRefError as error:
        print(f"{error} Run the demo first.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
