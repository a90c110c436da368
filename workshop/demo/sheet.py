"""The demo's result as one picture: a row for each group, its references and what came of them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

from .canvas import Colour
from .parts import Material, Pictures, Row, RowPictures
from .readings import RowReadings, summary

_PAPER: Colour = (250, 248, 244)
_LINE: Colour = (222, 216, 206)
_INK: Colour = (44, 42, 48)
_GREY: Colour = (112, 106, 102)
_ACCENT: Colour = (34, 139, 141)

_MARGIN = 48
_GAP = 20
_TILE = 256  # twice the demo's pictures
_SMALL_GAP = 8
_HEADER = 124
_HEADINGS = 66
_CAPTION = 44
_NOTE = 30
_BETWEEN = 22  # rows
_FOOTER = 72

_NARROW = (_TILE - _SMALL_GAP) // 2

# Heading, the line below it, width.
_COLUMNS = (
    ("References", "all that EasyRef is given", _TILE),
    ("Prompt only", "the same model without EasyRef", _TILE),
    ("EasyRef", "references read together", _TILE),
    ("Outline", "for the ControlNet", _NARROW),
    ("EasyRef + ControlNet", "composition from the outline", _TILE),
    ("Averaged", "each reference read alone", _TILE),
)
_OUTLINE = 3
# Column of each of `RowPictures.named`.
_PLACES = {"prompt_only": 1, "easyref": 2, "easyref_controlnet": 4, "average": 5}
_KINDS = {
    "identity": "One character",
    "crowded": "One character, a friend in every reference",
    "style": "One style",
}


def draw_sheet(
    material: Material,
    pictures: Pictures,
    trained: bool,
    readings: Sequence[RowReadings] | None = None,
) -> Image.Image:
    """Compose the sheet.

    Args:
        readings: what the judge sees, by row; without it the notes say how far each picture is
            away from the one that the prompt alone gives.
    """
    row_height = _CAPTION + _TILE + _NOTE + _BETWEEN
    width = _column(len(_COLUMNS)) - _GAP + _MARGIN
    top = _HEADER + _HEADINGS
    height = top + len(material.rows) * row_height + _FOOTER
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _header(draw, width, trained)
    for number, row in enumerate(material.rows):
        reading = readings[number] if readings is not None else None
        y = top + number * row_height
        _row(sheet, draw, y, row, pictures.rows[number], reading)
    draw.line((_MARGIN, height - _FOOTER, width - _MARGIN, height - _FOOTER), _LINE, 2)
    for line, text in enumerate(_footer(material, pictures, trained, readings is not None)):
        draw.text((_MARGIN, height - _FOOTER + 14 + 24 * line), text, _GREY, _font(16))
    return sheet


def fact_words(row: Row) -> str:
    """What the references share, in words."""
    facts = row.facts
    if row.kind == "style":
        return f"{facts['first']} and {facts['second']} {facts['pattern']} on {facts['ground']}"
    pattern = [] if facts["pattern"] == "plain" else [facts["pattern"]]
    eyes = "a single eye" if facts["eyes"] == "single" else f"{facts['eyes']} eyes"
    return ", ".join([f"{facts['colour']} {facts['shape']}", *pattern, eyes, facts["accessory"]])


def _header(draw: ImageDraw.ImageDraw, width: int, trained: bool) -> None:
    draw.text((_MARGIN, 34), "EasyRef for ComfyUI", _INK, _font(38))
    line = "Each row: four references, one prompt that does not describe them, one seed."
    draw.text((_MARGIN, 84), line, _GREY, _font(18))
    if not trained:
        text = "untrained models: the results are noise"
        left = width - _MARGIN - draw.textlength(text, _font(18)) - 36
        draw.rounded_rectangle((left, 38, width - _MARGIN, 78), 20, (250, 228, 204))
        draw.text((left + 18, 58), text, (140, 80, 24), _font(18), anchor="lm")
    for column, (label, note, wide) in enumerate(_COLUMNS):
        x = _column(column)
        line_colour = _ACCENT if column in _PLACES.values() else _LINE
        draw.rectangle((x, _HEADER, x + wide, _HEADER + 2), line_colour)
        draw.text((x, _HEADER + 12), label, _INK, _font(21))
        draw.text((x, _HEADER + 38), note, _GREY, _font(15))


def _row(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    y: int,
    row: Row,
    pictures: RowPictures,
    readings: RowReadings | None,
) -> None:
    """Caption, references as a block, results with a note below each."""
    base = y + _CAPTION - 14
    prompt = f"“{row.prompt}”"
    draw.text((_MARGIN, base), prompt, _INK, _font(20), anchor="ls")
    beside = _MARGIN + draw.textlength(prompt, _font(20)) + 24
    draw.text((beside, base), f"shared: {fact_words(row)}", _GREY, _font(16), anchor="ls")
    right = sheet.width - _MARGIN
    draw.text((right, base), _KINDS[row.kind], _ACCENT, _font(16), anchor="rs")
    top = y + _CAPTION
    _block(sheet, (_MARGIN, top), row.references)
    middle = top + (_TILE - _NARROW) // 2
    sheet.paste(_sized(row.outline, _NARROW), (_column(_OUTLINE), middle))
    for name, picture in pictures.named().items():
        x = _column(_PLACES[name])
        sheet.paste(_sized(picture, _TILE), (x, top))
        note = _difference(picture, pictures.prompt_only)
        if readings is not None:
            note = summary(readings[name])
        elif picture is pictures.prompt_only:
            note = "no references"
        draw.text((x, top + _TILE + 20), note, _GREY, _font(15), anchor="ls")


def _block(sheet: Image.Image, corner: tuple[int, int], pictures: Sequence[Image.Image]) -> None:
    """Up to four pictures in two columns, as large as one result."""
    step = _NARROW + _SMALL_GAP
    for number, picture in enumerate(pictures[:4]):
        down, right = divmod(number, 2)
        sheet.paste(_sized(picture, _NARROW), (corner[0] + right * step, corner[1] + down * step))


def _footer(material: Material, pictures: Pictures, trained: bool, judged: bool) -> tuple[str, str]:
    settings = material.settings
    held_out = "No training picture shows these characters and this style. " if trained else ""
    notes = "how many attributes the judge network reads as wanted"
    if not judged:
        notes = "how far a picture's levels are from the prompt alone, in percent of their range"
    return (
        f"Made by {pictures.made_by}: DDIM, {settings.steps} steps, CFG {settings.cfg:g}, seed "
        f"{settings.seed} for every picture, ControlNet strength {settings.control_strength:g}, "
        f"{settings.side} x {settings.side} pixels, shown at {_TILE / settings.side:g} times that.",
        f"{held_out}Below each picture: {notes}.",
    )


def _column(number: int) -> int:
    """Where a column begins."""
    return _MARGIN + sum(wide + _GAP for _, _, wide in _COLUMNS[:number])


def _sized(picture: Image.Image, side: int) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def _difference(first: Image.Image, second: Image.Image) -> str:
    """Mean difference of the levels, in percent of their range."""
    levels = ImageStat.Stat(ImageChops.difference(first.convert("RGB"), second.convert("RGB")))
    return f"{sum(levels.mean) / len(levels.mean) / 255:.1%} from prompt only"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
