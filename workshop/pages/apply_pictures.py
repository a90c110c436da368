"""Draws the help pages' pictures of Region, Layer Weights, Weight Curve and Set Conditioning.

    python -m workshop.pages.apply_pictures

The cards and nodes are those of make_pictures.
"""

from __future__ import annotations

from easyref_core.adapter.curves import SHAPES, curve_points
from easyref_core.adapter.layer_weights import GROUPS, PROFILES

from .make_pictures import (
    CLIP,
    FIELD,
    GROUP,
    IMAGE,
    LINE,
    MASK,
    MODEL,
    PROMPT,
    SOFT,
    TEXT,
    TOKENS,
    Sheet,
)


def region() -> None:
    sheet = Sheet(196)
    places = ((14, 20, TOKENS, True), (158, 126, GROUP, False))
    previous = None
    for number, (x, y, colour, left) in enumerate(places, start=1):
        sheet.box(x, y, 56, 56, FIELD, MASK, 3, 1.2)
        sheet.box(x + (0 if left else 28), y, 28, 56, TEXT, None, 3)
        inputs, outputs = sheet.node(
            x + 84,
            y - 4 if left else y - 42,
            112,
            f"EasyRef Region {number}",
            [("tokens", colour), ("mask", MASK), ("previous", IMAGE)],
            [("regions", IMAGE)],
        )
        sheet.link((x + 60, y + 28), inputs["mask"], MASK)
        if previous is not None:
            sheet.link(previous, inputs["previous"], IMAGE)
        previous = end = outputs["regions"]
    sheet.link(end, (370, end[1]), IMAGE)
    sheet.text(378, end[1] - 6, "EasyRef", TEXT, 10)
    sheet.text(378, end[1] + 7, "Apply", TEXT, 10)
    sheet.box(256, 12, 84, 44, FIELD, LINE, 3, 1.2)
    sheet.box(256, 12, 42, 44, TOKENS, None, 3)
    sheet.box(298, 12, 42, 44, GROUP, None, 3)
    sheet.text(298, 67, "two groups, one sampling", SOFT, 9.5, "mm")
    sheet.save("region")


def layer_weights() -> None:
    sheet = Sheet(176)
    shown = [name for name in PROFILES if name != "all"][:2]
    for row, name in enumerate(shown):
        weights, top = PROFILES[name], 22 + 70 * row
        sheet.text(14, top + 22, name, TEXT, 10.5)
        for place, group in enumerate(GROUPS):
            x, tall = 118 + 27 * place, 40 * weights.of(group)
            sheet.box(x, top, 19, 40, FIELD, LINE, 3)
            if tall > 0:
                sheet.box(x, top + 40 - tall, 19, tall, TOKENS, None, 3)
            words = group.replace("input_", "in ").replace("output_", "out ")
            sheet.text(x + 9.5, top + 50, words.replace("middle", "mid"), SOFT, 7.5, "mm")
    sheet.text(118, 164, "from the first attention group to the last", SOFT, 9.5)
    sheet.save("layer_weights")


def weight_curve() -> None:
    sheet = Sheet(150)
    shapes = [shape for shape in SHAPES if shape.startswith(("linear", "ease"))][:4]
    for place, shape in enumerate(shapes):
        left, top, side = 14 + 104 * place, 22.0, 88.0
        sheet.box(left, top, side, side, FIELD, LINE, 3)
        points = curve_points(shape, 1.0, 0.0, "")
        line = [(left + p * side, top + 6 + (1 - v) * (side - 12)) for p, v in points]
        sheet.line(line, TOKENS, 2.2)
        sheet.text(left + side / 2, top + side + 12, shape, TEXT, 9.5, "mm")
    sheet.text(215, 140, "start_value 1, end_value 0, over the sampling", SOFT, 9.5, "mm")
    sheet.save("weight_curve")


def set_conditioning() -> None:
    sheet = Sheet(196)
    ends = []
    for y, words, colour in ((14, "a knight", TOKENS), (106, "a dragon", GROUP)):
        _, text = sheet.node(
            14, y, 112, "CLIP Text Encode", (), [("CONDITIONING", PROMPT)], [("text", words)], CLIP
        )
        inputs, outputs = sheet.node(
            160,
            y,
            150,
            "EasyRef Set Conditioning",
            [("conditioning", PROMPT), ("tokens", colour)],
            [("conditioning", PROMPT)],
            [("weight", "1.00")],
            MODEL,
        )
        sheet.link(text["CONDITIONING"], inputs["conditioning"], PROMPT)
        ends.append(outputs["conditioning"])
    for end in ends:
        sheet.link(end, (352, 100), PROMPT)
    sheet.text(361, 94, "Combine,", TEXT, 10)
    sheet.text(361, 108, "KSampler", TEXT, 10)
    sheet.save("set_conditioning")


if __name__ == "__main__":
    region()
    layer_weights()
    weight_curve()
    set_conditioning()
