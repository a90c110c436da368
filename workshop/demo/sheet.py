"""The demo's results as one image: a row per group, with its references and the images sampled."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .canvas import Colour
from .predictions import RowPredictions, summary
from .rows import DemoImages, DemoInputs, Row, RowImages

_PAPER: Colour = (250, 248, 244)
_LINE: Colour = (222, 216, 206)
_INK: Colour = (44, 42, 48)
_GREY: Colour = (112, 106, 102)
_ACCENT: Colour = (34, 139, 141)

_MARGIN = 48
_GAP = 24
_TILE = 256  # pixels, twice the demo's images
_SMALL_GAP = 8
_HEADER = 124
_HEADINGS = 66
_CAPTION = 44
_NOTE = 30
_ROW_GAP = 26
_FOOTER = 96

_NARROW = (_TILE - _SMALL_GAP) // 2
_CELL = 120  # an image to compare with
_CELL_HEIGHT = 143  # with its note

_REFERENCES = ("References", "all that EasyRef is given")
_COMPARED = ("To compare with", "the same seed, without all of it")
# Result, by the names of `RowImages.named` -> heading, the line below it.
_RESULTS = {
    "easyref": ("EasyRef", "references encoded together"),
    "identity": ("EasyRef + identity", "self-attention reads the references, too"),
    "easyref_controlnet": ("EasyRef + ControlNet", "composition from the outline"),
}
# Result -> the note below it; the outline is no result.
_CELLS = {
    "prompt_only": "same prompt",
    "described": "described",
    "average": "averaged",
    "outline": "outline",
}
_KINDS = {
    "identity": "One character",
    "crowded": "One character, a friend in every reference",
    "style": "One style",
}


def draw_sheet(
    inputs: DemoInputs, images: DemoImages, predictions: Sequence[RowPredictions]
) -> Image.Image:
    """Compose the sheet.

    Args:
        predictions: by row; the note below each image says how many attributes are correct.
    """
    row_height = _CAPTION + _TILE + _NOTE + _ROW_GAP
    shown = [name for name in _RESULTS if name in images.rows[0].named()]
    width = _column(len(shown) + 1) + 2 * _CELL + _SMALL_GAP + _MARGIN
    top = _HEADER + _HEADINGS
    height = top + len(inputs.rows) * row_height + _FOOTER
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _header(draw, shown)
    for number, row in enumerate(inputs.rows):
        y = top + number * row_height
        _row(sheet, draw, y, row, images.rows[number], predictions[number])
    draw.line((_MARGIN, height - _FOOTER, width - _MARGIN, height - _FOOTER), _LINE, 2)
    for line, text in enumerate(_footer(inputs, images)):
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


def _header(draw: ImageDraw.ImageDraw, shown: Sequence[str]) -> None:
    draw.text((_MARGIN, 34), "EasyRef for ComfyUI", _INK, _font(38))
    line = "Each row: four references, one prompt that does not describe them, one seed."
    draw.text((_MARGIN, 84), line, _GREY, _font(18))
    headings = (_REFERENCES, *(_RESULTS[name] for name in shown), _COMPARED)
    for column, (label, note) in enumerate(headings):
        x, accent = _column(column), 0 < column < len(headings) - 1
        wide = 2 * _CELL + _SMALL_GAP if column == len(headings) - 1 else _TILE
        draw.rectangle((x, _HEADER, x + wide, _HEADER + 2), _ACCENT if accent else _LINE)
        draw.text((x, _HEADER + 12), label, _INK, _font(21))
        draw.text((x, _HEADER + 38), note, _GREY, _font(13))


def _row(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    y: int,
    row: Row,
    images: RowImages,
    predictions: RowPredictions,
) -> None:
    """Caption, references in a square, results with a note below each."""
    base = y + _CAPTION - 14
    prompt = f"“{row.prompt}”"
    draw.text((_MARGIN, base), prompt, _INK, _font(20), anchor="ls")
    beside = _MARGIN + draw.textlength(prompt, _font(20)) + 24
    draw.text((beside, base), f"shared: {fact_words(row)}", _GREY, _font(16), anchor="ls")
    right = sheet.width - _MARGIN
    draw.text((right, base), _KINDS[row.kind], _ACCENT, _font(16), anchor="rs")
    top = y + _CAPTION
    _grid(sheet, (_MARGIN, top), row.references)
    results = images.named()
    shown = [name for name in _RESULTS if name in results]
    for column, name in enumerate(shown, 1):
        x = _column(column)
        sheet.paste(_resized(results[name], _TILE), (x, top))
        note = summary(predictions[name])
        draw.text((x, top + _TILE + 20), note, _GREY, _font(15), anchor="ls")
    for number, (name, label) in enumerate(_CELLS.items()):
        down, right = divmod(number, 2)
        x = _column(len(shown) + 1) + right * (_CELL + _SMALL_GAP)
        y = top + down * _CELL_HEIGHT
        note = label
        if name in predictions:
            right_ones = sum(p.correct for p in predictions[name])
            note = f"{label}: {right_ones} of {len(predictions[name])}"
        sheet.paste(_resized(results.get(name, row.outline), _CELL), (x, y))
        draw.text((x, y + _CELL + 15), note, _GREY, _font(12), anchor="ls")


def _grid(sheet: Image.Image, corner: tuple[int, int], images: Sequence[Image.Image]) -> None:
    """Up to four images in two columns, as large as one result."""
    step = _NARROW + _SMALL_GAP
    for number, image in enumerate(images[:4]):
        down, right = divmod(number, 2)
        sheet.paste(_resized(image, _NARROW), (corner[0] + right * step, corner[1] + down * step))


def _footer(inputs: DemoInputs, images: DemoImages) -> tuple[str, ...]:
    settings = inputs.settings
    return (
        f"Made by {images.made_by}: DDIM, {settings.steps} steps, CFG {settings.cfg:g}, seed "
        f"{settings.seed} for every image, ControlNet strength {settings.control_strength:g}, "
        f"{settings.side} x {settings.side} pixels, shown at {_TILE / settings.side:g} times that.",
        "No training image shows these characters and this style. Below each image: how many "
        "attributes a classifier finds as expected.",
        "Same prompt: without EasyRef. Described: without EasyRef, by a prompt that names the "
        "figure. Averaged: each reference encoded alone.",
    )


def _column(number: int) -> int:
    """Left edge of a column, in pixels."""
    return _MARGIN + number * (_TILE + _GAP)


def _resized(image: Image.Image, side: int) -> Image.Image:
    return image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
