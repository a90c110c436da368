"""The demo's result as one picture: references beside what came of them, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageStat

from .canvas import Colour
from .parts import Material, Pictures

_PAPER: Colour = (250, 248, 244)
_CARD: Colour = (255, 255, 255)
_LINE: Colour = (226, 220, 210)
_INK: Colour = (44, 42, 48)
_GREY: Colour = (122, 116, 112)
_ACCENT: Colour = (34, 139, 141)

_MARGIN = 40
_GAP = 24
_TILE = 320
_HEADER = 112
_LABEL = 64
_STRIP = 84
_FOOTER = 56


@dataclass(frozen=True)
class Column:
    """One result with what it was made from.

    Attributes:
        note: the line below the label.
        inputs: small pictures below the result.
        text: shown there where there are no pictures.
    """

    label: str
    note: str
    picture: Image.Image
    inputs: Sequence[Image.Image] = field(default=())
    text: str = ""


def draw_sheet(material: Material, pictures: Pictures, trained: bool) -> Image.Image:
    """Compose the sheet."""
    settings = material.settings
    plain, easyref = pictures.prompt_only, pictures.easyref
    # Thicker lines, to be seen at this size.
    edges = pictures.edges.convert("RGB").filter(ImageFilter.MaxFilter(5))
    columns = [
        Column("Prompt only", "no EasyRef", plain, text=f"“{settings.prompt}”"),
        Column(
            "EasyRef",
            f"{_difference(easyref, plain)} away from prompt only",
            easyref,
            material.references,
        ),
        Column(
            "EasyRef, other references",
            f"{_difference(pictures.others, easyref)} away from EasyRef",
            pictures.others,
            material.others,
        ),
        Column(
            "EasyRef + ControlNet",
            f"{_difference(pictures.controlled, easyref)} away from EasyRef",
            pictures.controlled,
            [*material.references, edges],
        ),
    ]
    count = len(columns) + 1
    width = 2 * _MARGIN + count * _TILE + (count - 1) * _GAP
    top = _HEADER + _LABEL
    height = top + _TILE + _GAP // 2 + _STRIP + _FOOTER
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 28), "EasyRef for ComfyUI", _INK, _font(36))
    made = f"one run on the demo models, made by {pictures.made_by}"
    draw.text((_MARGIN, 74), made, _GREY, _font(18))
    if not trained:
        _badge(draw, width - _MARGIN, 36, "untrained models: the results are noise")

    x = _MARGIN
    _label(draw, x, "References", "one character, three sizes")
    box = (_TILE, _TILE + _GAP // 2 + _STRIP)
    sheet.paste(collage(material.references, box), (x, top))
    for column in columns:
        x += _TILE + _GAP
        _label(draw, x, column.label, column.note)
        sheet.paste(column.picture.resize((_TILE, _TILE), Image.Resampling.LANCZOS), (x, top))
        strip = (x, top + _TILE + _GAP // 2, x + _TILE, top + _TILE + _GAP // 2 + _STRIP)
        draw.rounded_rectangle(strip, 8, _CARD, _LINE)
        if column.inputs:
            _row(sheet, strip, column.inputs)
        else:
            _paragraph(draw, strip, column.text)
    line = (
        f"same seed ({settings.seed}) for all, {settings.steps} steps, CFG {settings.cfg:g}, "
        f"{settings.side}x{settings.side} pixels"
    )
    draw.text((_MARGIN, height - 36), line, _GREY, _font(16))
    return sheet


def collage(pictures: Sequence[Image.Image], box: tuple[int, int], gap: int = 8) -> Image.Image:
    """Three pictures filling a box's width: the first alone, the others beside each other below.

    Shapes are kept; what the box leaves over is paper.
    """
    first, second, third = pictures
    sheet = Image.new("RGB", box, _PAPER)
    top = round(box[0] * first.height / first.width)
    shapes = second.width / second.height + third.width / third.height
    bottom = round((box[0] - gap) / shapes)
    scale = min(1.0, box[1] / (top + gap + bottom))
    left = round(box[0] * (1 - scale) / 2)
    top, bottom, gap = round(top * scale), round(bottom * scale), round(gap * scale)
    above = _high(first, top)
    sheet.paste(above, (left, 0))
    beside = _high(second, bottom)
    sheet.paste(beside, (left, top + gap))
    sheet.paste(_high(third, bottom), (left + beside.width + gap, top + gap))
    return sheet


def _high(picture: Image.Image, height: int) -> Image.Image:
    width = round(picture.width * height / picture.height)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _difference(first: Image.Image, second: Image.Image) -> str:
    """Mean difference of the levels, in percent of their range."""
    levels = ImageStat.Stat(ImageChops.difference(first.convert("RGB"), second.convert("RGB")))
    return f"{sum(levels.mean) / len(levels.mean) / 255:.1%}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _label(draw: ImageDraw.ImageDraw, x: int, label: str, note: str) -> None:
    draw.rectangle((x, _HEADER + 2, x + 28, _HEADER + 5), _ACCENT)
    draw.text((x, _HEADER + 10), label, _INK, _font(22))
    draw.text((x, _HEADER + 37), note, _GREY, _font(15))


def _badge(draw: ImageDraw.ImageDraw, right: int, y: int, text: str) -> None:
    width = draw.textlength(text, _font(18)) + 32
    draw.rounded_rectangle((right - width, y, right, y + 38), 19, (250, 228, 204))
    draw.text((right - width + 16, y + 8), text, (140, 80, 24), _font(18))


def _row(
    sheet: Image.Image, box: tuple[int, int, int, int], pictures: Sequence[Image.Image]
) -> None:
    """Small pictures side by side in the middle of a box."""
    gap, pad = 8, 8
    shapes = sum(p.width / p.height for p in pictures)
    room = box[2] - box[0] - 2 * pad - gap * (len(pictures) - 1)
    height = int(min(box[3] - box[1] - 2 * pad, room / shapes))
    small = [_high(picture, height) for picture in pictures]
    x = (box[0] + box[2] - sum(p.width for p in small) - gap * (len(small) - 1)) // 2
    y = (box[1] + box[3] - height) // 2
    for picture in small:
        sheet.paste(picture, (x, y))
        x += picture.width + gap


def _paragraph(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], text: str) -> None:
    """Text broken into lines, in the middle of a box."""
    font, room = _font(15), box[2] - box[0] - 24
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    y = (box[1] + box[3] - 20 * len(lines)) / 2
    for number, line in enumerate(lines):
        x = (box[0] + box[2] - draw.textlength(line, font)) / 2
        draw.text((x, y + 20 * number), line, _INK, font)
