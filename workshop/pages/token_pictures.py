"""Draws the help pages' pictures of Quick, Crop, Combine Tokens and Inspect into web/docs/images.

    python -m workshop.pages.token_pictures

The cards and nodes are those of make_pictures.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from easyref_core.encode.heat_maps import draw_heat_maps
from easyref_core.encode.inspection import Inspection, PictureShare
from easyref_core.pictures.crop import Box, crop_window

from .make_pictures import (
    CARD,
    EASYREF,
    FIELD,
    GROUP,
    IMAGE,
    LINE,
    MASK,
    MODEL,
    OUT,
    SKIES,
    SOFT,
    TEXT,
    TOKENS,
    Sheet,
)

ROOT = Path(__file__).resolve().parents[2]
_CELL = 13.0


def quick() -> None:
    sheet = Sheet(226)
    _, models = sheet.node(14, 16, 120, "Load Checkpoint", (), [("MODEL", MODEL)], accent=MODEL)
    _, loaded = sheet.node(14, 84, 120, "EasyRef Loader", (), [("easyref", EASYREF)])
    sheet.picture(40, 150, 66, 54, SKIES[2])
    inputs, outputs = sheet.node(
        184,
        46,
        142,
        "EasyRef Quick",
        [("model", MODEL), ("easyref", EASYREF), ("images", IMAGE)],
        [("model", MODEL)],
        [("prompt", "in a forest"), ("weight", "1.00")],
        MODEL,
    )
    sheet.link(models["MODEL"], inputs["model"], MODEL)
    sheet.link(loaded["easyref"], inputs["easyref"], EASYREF)
    sheet.link((110, 177), inputs["images"], IMAGE)
    target = (358.0, outputs["model"][1])
    sheet.link(outputs["model"], target, MODEL)
    sheet.text(target[0] + 9, target[1], "KSampler", TEXT, 10)
    sheet.text(255, 190, "EasyRef Encode and EasyRef Apply", SOFT, 10, "mm")
    sheet.text(255, 204, "in one, with their defaults", SOFT, 10, "mm")
    sheet.save("quick")


def crop() -> None:
    sheet = Sheet(206)
    left, top, width, height = 14.0, 40.0, 200.0, 120.0
    sheet.text(left, 24, "one picture, two masks", SOFT, 10)
    sheet.box(left, top, width, height, SKIES[0], IMAGE, 3, 1.2)
    people = ((46.0, 66.0, 44.0, 60.0), (140.0, 84.0, 36.0, 50.0))
    for number, (x, y, w, h) in enumerate(people, start=1):
        _head(sheet, x, y, w, h)
        sheet.box(x, y, w, h, None, MASK, 2, 1.6)
        box = Box((x - left) / width, (y - top) / height, w / width, h / height)
        found = crop_window(box, round(width), round(height), 0.25, True)
        a, b, c, d = found[0] + left, found[1] + top, found[2] + left, found[3] + top
        sheet.box(a, b, c - a, d - b, None, GROUP, 2, 1.2)
        side, at = 88.0, 236.0 + 96 * (number - 1)
        sheet.box(at, 56, side, side, SKIES[0], GROUP, 3, 1.2)
        zoom = side / (c - a)
        _head(sheet, at + (x - a) * zoom, 56 + (y - b) * zoom, w * zoom, h * zoom)
        sheet.text(at + side / 2, 154, f"crop {number}", TEXT, 10, "mm")
    for x, colour, words in ((14, MASK, "mask"), (66, GROUP, "with padding 0.25, square")):
        sheet.box(x, 173, 10, 10, None, colour, 2, 1.6)
        sheet.text(x + 16, 178, words, SOFT, 10)
    sheet.text(328, 178, "one group, of any sizes", SOFT, 10, "mm")
    sheet.save("crop")


def _head(sheet: Sheet, x: float, y: float, w: float, h: float) -> None:
    """The character of the other pictures, filling a box."""
    face = (x + 0.1 * w, y + 0.35 * h, x + 0.9 * w, y + h)
    sheet.draw.ellipse(sheet._px(*face), "#f6a55c")
    brim = y + 0.48 * h
    sheet.shape([(x + 0.12 * w, brim), (x + 0.88 * w, brim), (x + w / 2, y)], "#d6455d")
    for side in (-1, 1):
        sheet.dot(x + w / 2 + side * 0.16 * w, y + 0.68 * h, "#2b2118", 0.06 * w)


def combine_tokens() -> None:
    sheet = Sheet(302)
    for x, number, colour in ((14, 1, TOKENS), (120, 2, IMAGE)):
        sheet.text(x, 24, f"tokens_{number}", colour, 10.5)
        _row(sheet, x, 34, [colour] * 6)
    sheet.text(226, 24, "black picture", SOFT, 10.5)
    _row(sheet, 226, 34, [FIELD] * 6)
    sheet.line([(14, 66), (416, 66)], LINE, 1)
    sheet.text(118, 82, "picture follows", SOFT, 9.5)
    sheet.text(296, 82, "and is led away from", SOFT, 9.5)
    mixed = "#62c6cc"
    rows = (
        ("concatenate", [TOKENS] * 6 + [IMAGE] * 6, [FIELD] * 6),
        ("average", [mixed] * 6, [FIELD] * 6),
        ("add", ["#b9fff4"] * 6, [FIELD] * 6),
        ("subtract", ["#3f8f57"] * 6, [FIELD] * 6),
        ("avoid", [TOKENS] * 6, [IMAGE] * 6),
    )
    for line, (method, follows, avoids) in enumerate(rows):
        y = 94 + 30 * line
        sheet.text(14, y + 8, method, TEXT, 11)
        _row(sheet, 118, y, follows)
        _row(sheet, 296, y, avoids)
    top = 94 + 30 * len(rows)
    sheet.text(14, top + 19, "batch", TEXT, 11)
    for latent, colour in enumerate((TOKENS, IMAGE)):
        y = top + 24 * latent
        _row(sheet, 118, y, [colour] * 6)
        sheet.text(204, y + 8, f"latent {latent + 1}", SOFT, 9.5)
        _row(sheet, 296, y, [FIELD] * 6)
    sheet.save("combine_tokens")


def _row(sheet: Sheet, x: float, y: float, colours: list[str]) -> None:
    for number, colour in enumerate(colours):
        sheet.box(x + _CELL * number, y, 11, 15, colour, LINE if colour == FIELD else None, 2)


def inspect() -> None:
    """The node's own cards, over the demo's references and with made-up attention."""
    pictures, shares = [], []
    for number, part in ((1, 0.0035), (2, 0.0018)):
        pictures.append(Image.open(ROOT / f"demo/references/flower/{number}.png").convert("RGB"))
        y, x = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12), indexing="ij")
        heat = part * torch.exp(-5 * (x**2 + y**2)) + 0.00005
        shares.append(PictureShare(f"image_{number}", float(heat.sum()), heat))
    cards = draw_heat_maps(Inspection(tuple(shares), 0.1, 0.4, 0.1), pictures)
    width, gap = 404, 18
    height = round(width * cards[0].height / cards[0].width)
    sheet = Image.new("RGB", (2 * width + 3 * gap, height + 2 * gap), CARD)
    for number, card in enumerate(cards):
        small = card.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(small, (gap + number * (width + gap), gap))
    sheet.save(OUT / "inspect.jpg", quality=85, optimize=True)  # smooth colours: not as PNG


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for draw in (quick, crop, combine_tokens, inspect):
        draw()


if __name__ == "__main__":
    main()
