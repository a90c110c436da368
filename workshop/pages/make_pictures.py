"""Draws the pictures of the node help pages into web/docs/images.

    python -m workshop.pages.make_pictures

Those of other nodes are made by apply_pictures.py, demo_pictures.py and token_pictures.py; that of
EasyRef References is a photograph, made by gallery_picture.py.

Pillow's built-in typeface is used, so the pictures come out the same on every computer. Each one
brings its own dark card with rounded corners and can stand on a light or a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

OUT = Path(__file__).resolve().parents[2] / "web" / "docs" / "images"
ZOOM = 4  # drawn this many times larger, then reduced, for smooth edges
SCALE = 2  # pixels of the finished picture for one unit of the coordinates below
WIDTH = 430  # so narrow that words stay readable in the help panel

Point = tuple[float, float]
Slots = dict[str, Point]

CARD = "#1d1f26"
NODE = "#2c303a"
HEAD = "#373c49"
FIELD = "#1a1c22"
LINE = "#4d5464"
TEXT = "#e8eaf0"
SOFT = "#a7adbb"
IMAGE = "#64b5f6"
MODEL = "#b39ddb"
EASYREF = "#ffc857"
GROUP = "#f48fb1"
TOKENS = "#5fd6a4"
PROMPT = "#ffa931"
MASK = "#9ccc65"
CLIP = "#ffd54f"


class Sheet:
    """A card to draw on, in units of `SCALE` finished pixels."""

    def __init__(self, height: float) -> None:
        self._unit = SCALE * ZOOM
        size = (round(WIDTH * self._unit), round(height * self._unit))
        self.image = Image.new("RGBA", size)
        self.draw = ImageDraw.Draw(self.image)
        self.box(0, 0, WIDTH, height, CARD, radius=12)

    def _px(self, *values: float) -> tuple[float, ...]:
        return tuple(v * self._unit for v in values)

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str | None = None,
        outline: str | None = None,
        radius: float = 5,
        thick: float = 1,
    ) -> None:
        """A rounded rectangle."""
        self.draw.rounded_rectangle(
            self._px(x, y, x + w, y + h),
            radius * self._unit,
            fill,
            outline,
            round(thick * self._unit),
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str = TEXT,
        size: float = 11,
        anchor: str = "lm",
        bold: bool = False,
    ) -> None:
        """Words at a point; `anchor` as Pillow has it (l, m, r and t, m, b)."""
        font = ImageFont.load_default(size * self._unit)
        thick = round(0.022 * size * self._unit) if bold else 0
        self.draw.text(
            self._px(x, y), words, colour, font, anchor, stroke_width=thick, stroke_fill=colour
        )

    def dot(self, x: float, y: float, colour: str, radius: float = 3.6) -> None:
        self.draw.ellipse(self._px(x - radius, y - radius, x + radius, y + radius), colour)

    def line(self, points: Sequence[Point], colour: str, thick: float = 2) -> None:
        flat = [self._px(*p) for p in points]
        self.draw.line(flat, colour, round(thick * self._unit), "curve")

    def shape(self, points: Sequence[Point], colour: str) -> None:
        self.draw.polygon([self._px(*p) for p in points], colour)

    def link(self, start: Point, end: Point, colour: str) -> None:
        """A link between two slots, bent as in the graph."""
        (x0, y0), (x1, y1) = start, end
        reach = max(18.0, abs(x1 - x0) * 0.5)
        points = []
        for step in range(65):
            t = step / 64
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            points.append(
                (a * x0 + b * (x0 + reach) + c * (x1 - reach) + d * x1, (a + b) * y0 + (c + d) * y1)
            )
        self.line(points, colour, 2.2)
        self.dot(*start, colour)
        self.dot(*end, colour)

    def arrow(self, start: Point, end: Point, colour: str = SOFT, thick: float = 1.6) -> None:
        """A straight arrow, across or down."""
        (x0, y0), (x1, y1) = start, end
        length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-6)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        self.line([start, (x1 - 5 * dx, y1 - 5 * dy)], colour, thick)
        back = (x1 - 7 * dx, y1 - 7 * dy)
        self.shape(
            [end, (back[0] - 4 * dy, back[1] + 4 * dx), (back[0] + 4 * dy, back[1] - 4 * dx)],
            colour,
        )

    def node(
        self,
        x: float,
        y: float,
        w: float,
        title: str,
        inputs: Iterable[tuple[str, str]] = (),
        outputs: Iterable[tuple[str, str]] = (),
        fields: Iterable[tuple[str, str]] = (),
        accent: str = EASYREF,
    ) -> tuple[Slots, Slots]:
        """A node as in the graph. Returns where its input and output slots are."""
        inputs, outputs, fields = list(inputs), list(outputs), list(fields)
        rows = max(len(inputs), len(outputs))
        height = 24 + 17 * rows + (4 if rows else 6) + 21 * len(fields) + 4
        self.box(x, y, w, height, NODE, LINE, 6)
        self.box(x + 0.5, y + 0.5, w - 1, 21, HEAD, None, 6)
        self.draw.rectangle(self._px(x + 0.5, y + 14, x + w - 0.5, y + 21.5), HEAD)
        self.dot(x + 11, y + 11, accent, 3.2)
        self.text(x + 20, y + 11, title, TEXT, 11, bold=True)
        places: tuple[Slots, Slots] = ({}, {})
        for side, slots in enumerate((inputs, outputs)):
            for row, (name, colour) in enumerate(slots):
                at = (x + (w if side else 0), y + 33 + 17 * row)
                self.dot(*at, colour)
                if side:
                    self.text(at[0] - 9, at[1], name, TEXT, 10, "rm")
                else:
                    self.text(at[0] + 9, at[1], name, TEXT, 10)
                places[side][name] = at
        top = y + 24 + 17 * rows + (4 if rows else 6)
        for row, (name, value) in enumerate(fields):
            self.box(x + 8, top + 21 * row, w - 16, 17, FIELD, LINE, 8)
            self.text(x + 16, top + 21 * row + 8.5, name, SOFT, 9.5)
            self.text(x + w - 16, top + 21 * row + 8.5, value, TEXT, 9.5, "rm")
        return places

    def file(self, x: float, y: float, name: str, colour: str, w: float = 130) -> Point:
        """A file by its name. Returns the middle of its right side."""
        self.box(x, y, w, 24, NODE, LINE, 4)
        self.shape([(x + 8, y + 5), (x + 15, y + 5), (x + 19, y + 9), (x + 19, y + 19)], colour)
        self.shape([(x + 8, y + 5), (x + 19, y + 19), (x + 8, y + 19)], colour)
        self.text(x + 26, y + 12, name, TEXT, 9.5)
        return x + w, y + 12

    def picture(self, x: float, y: float, w: float, h: float, sky: str, number: int = 0) -> None:
        """A reference: always the same character, in a frame of any shape."""
        self.box(x, y, w, h, sky, IMAGE, 3, 1.2)
        unit = min(w, h) / 10
        cx, cy = x + w / 2, y + h * 0.56
        face = (cx - 2.6 * unit, cy - 2.2 * unit, cx + 2.6 * unit, cy + 3 * unit)
        self.draw.ellipse(self._px(*face), "#f6a55c")
        brim, tip = cy - 1.5 * unit, cy - 4.6 * unit
        self.shape([(cx - 2.2 * unit, brim), (cx + 2.2 * unit, brim), (cx, tip)], "#d6455d")
        for side in (-1, 1):
            self.dot(cx + side * unit, cy + 0.2 * unit, "#2b2118", 0.42 * unit)
        if number:
            self.dot(x, y, IMAGE, 6)
            self.text(x, y, str(number), CARD, 9, "mm", bold=True)

    def save(self, name: str) -> None:
        size = tuple(round(side / ZOOM) for side in self.image.size)
        small = self.image.resize(size, Image.Resampling.LANCZOS)
        few = small.quantize(192, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(OUT / f"{name}.png", optimize=True)


SKIES = ("#3b4d6b", "#55604a", "#5c4a63")
SIZES = ((52, 40), (34, 52), (44, 44))  # of the three references


def loader() -> None:
    sheet = Sheet(196)
    sheet.text(14, 24, "models/easyref", SOFT, 10)
    adapter = sheet.file(14, 34, "model.safetensors", EASYREF, 150)
    for row, words in enumerate(
        ("reference tokens, projector,", "keys, values, LoRA,", "often the MLLM too")
    ):
        sheet.text(40, 68 + 13 * row, words, SOFT, 9)
    sheet.text(14, 126, "models/LLM", SOFT, 10)
    folder = sheet.file(14, 136, "Qwen2-VL-2B-Instruct", IMAGE, 150)
    sheet.text(40, 170, "sizes, tokenizer, and what", SOFT, 9)
    sheet.text(40, 182, "the adapter does not hold", SOFT, 9)
    sheet.node(
        214,
        34,
        202,
        "EasyRef Loader",
        outputs=[("easyref", EASYREF)],
        fields=[
            ("adapter", "model.safetensors"),
            ("mllm", "Qwen2-VL-2B-Instruct"),
            ("precision", "auto"),
        ],
    )
    sheet.arrow(adapter, (218, 86), EASYREF)
    sheet.arrow(folder, (218, 108), IMAGE)
    sheet.text(315, 160, "Weights are read when", SOFT, 10, "mm")
    sheet.text(315, 174, "references are first encoded.", SOFT, 10, "mm")
    sheet.save("loader")


def encode() -> None:
    sheet = Sheet(208)
    x = 16.0
    for number, ((w, h), sky) in enumerate(zip(SIZES, SKIES, strict=True), start=1):
        sheet.picture(x + (56 - w) / 2, 72 - h, w, h, sky, number)
        sheet.arrow((x + 28, 75), (x + 28, 89), SOFT, 1.3)
        _cells(sheet, x, 92, 4, IMAGE)
        x += 64
    sheet.box(x, 44, 84, 28, FIELD, LINE, 8)
    sheet.text(x + 42, 58, "prompt", PROMPT, 11, "mm")
    sheet.arrow((x + 42, 75), (x + 42, 89), SOFT, 1.3)
    _cells(sheet, x, 92, 6, PROMPT)
    x += 92
    sheet.text(x + 56, 50, "64 learned", TOKENS, 10.5, "mm")
    sheet.text(x + 56, 64, "reference tokens", TOKENS, 10.5, "mm")
    sheet.arrow((x + 56, 75), (x + 56, 89), SOFT, 1.3)
    _cells(sheet, x, 92, 8, TOKENS, filled=False)
    sheet.box(16, 118, 398, 30, HEAD, LINE, 6)
    sheet.text(215, 133, "MLLM: each token sees all before it", TEXT, 11, "mm", bold=True)
    sheet.arrow((x + 56, 151), (x + 56, 166), TOKENS)
    _cells(sheet, x, 172, 8, TOKENS)
    sheet.text(x - 10, 179, "only these leave the node, as tokens", SOFT, 10, "rm")
    sheet.save("encode")


def _cells(sheet: Sheet, x: float, y: float, count: int, colour: str, filled: bool = True) -> None:
    for cell in range(count):
        fill, outline = (colour, None) if filled else (None, colour)
        sheet.box(x + 14 * cell, y, 12, 15, fill, outline, 2, 1.4)


def apply() -> None:
    sheet = Sheet(330)
    sheet.text(14, 24, "What: in every cross-attention layer", TEXT, 11, bold=True)
    for y, words, colour in ((56, "prompt", PROMPT), (100, "tokens", TOKENS)):
        sheet.box(14, y - 13, 62, 26, FIELD, LINE, 8)
        sheet.text(45, y, words, colour, 10.5, "mm")
        sheet.arrow((78, y), (98, y), colour)
        sheet.box(100, y - 13, 74, 26, NODE, LINE, 5)
        sheet.text(137, y, "attention", TEXT, 10.5, "mm")
    sheet.arrow((176, 100), (196, 100), TOKENS)
    sheet.box(198, 87, 76, 26, HEAD, EASYREF, 5)
    sheet.text(236, 100, "times weight", EASYREF, 10, "mm")
    sheet.line([(176, 56), (306, 56), (306, 82)], PROMPT, 1.6)
    sheet.arrow((306, 78), (306, 88), PROMPT)
    sheet.arrow((276, 100), (294, 100), TOKENS)
    sheet.dot(306, 100, HEAD, 11)
    sheet.line([(300, 100), (312, 100)], TEXT, 2)
    sheet.line([(306, 94), (306, 106)], TEXT, 2)
    sheet.arrow((318, 100), (340, 100), MODEL)
    sheet.box(342, 87, 72, 26, NODE, LINE, 5)
    sheet.text(378, 100, "SDXL", MODEL, 10.5, "mm", bold=True)

    sheet.text(14, 146, "When: start_percent, end_percent", TEXT, 11, bold=True)
    sheet.box(14, 162, 402, 20, FIELD, LINE, 6)
    sheet.box(14 + 80, 162, 242, 20, TOKENS, None, 4)
    sheet.text(215, 172, "references act", CARD, 10, "mm", bold=True)
    sheet.text(14, 195, "0: noise", SOFT, 9.5)
    sheet.text(94, 195, "0.2", EASYREF, 9.5, "mm")
    sheet.text(336, 195, "0.8", EASYREF, 9.5, "mm")
    sheet.text(416, 195, "1: done", SOFT, 9.5, "rm")

    sheet.text(14, 226, "Where: mask", TEXT, 11, bold=True)
    sheet.box(14, 242, 72, 72, "#0c0d10", LINE, 4)
    sheet.box(15, 243, 35, 70, "#f4f5f7", None, 3)
    sheet.arrow((92, 278), (116, 278), MASK)
    sheet.box(122, 242, 72, 72, SKIES[0], LINE, 4)
    sheet.picture(123, 244, 35, 68, SKIES[0])
    sheet.box(122, 242, 72, 72, None, LINE, 4)
    sheet.text(176, 278, "prompt", PROMPT, 9, "mm")
    sheet.text(212, 262, "White: references and prompt.", TEXT, 10)
    sheet.text(212, 277, "Black: the prompt alone.", TEXT, 10)
    sheet.text(212, 297, "The LoRA acts always, everywhere.", SOFT, 10)
    sheet.save("apply")


def save_tokens() -> None:
    sheet = Sheet(178)
    _, outputs = sheet.node(
        14,
        22,
        130,
        "EasyRef Encode",
        [("easyref", EASYREF), ("references", GROUP)],
        [("tokens", TOKENS)],
        accent=TOKENS,
    )
    saved, _ = sheet.node(
        200,
        16,
        214,
        "EasyRef Save Tokens",
        [("tokens", TOKENS)],
        (),
        [("filename_prefix", "people/ann"), ("folder", "output")],
        TOKENS,
    )
    sheet.link(outputs["tokens"], saved["tokens"], TOKENS)
    sheet.arrow((307, 112), (307, 134), TOKENS)
    sheet.text(194, 150, "output/easyref_tokens/people", SOFT, 10, "rm")
    sheet.file(200, 138, "ann_00001_.safetensors", TOKENS, 214)
    sheet.save("save_tokens")


def load_tokens() -> None:
    sheet = Sheet(214)
    _, easyref = sheet.node(
        14,
        16,
        122,
        "EasyRef Loader",
        (),
        [("easyref", EASYREF)],
        [("mllm", "from adapter")],
    )
    inputs, tokens = sheet.node(
        162,
        104,
        142,
        "EasyRef Load Tokens",
        [("easyref", EASYREF)],
        [("tokens", TOKENS)],
        [("file", "people/ann_0...")],
        TOKENS,
    )
    applied, _ = sheet.node(
        318,
        16,
        100,
        "EasyRef Apply",
        [("model", MODEL), ("easyref", EASYREF), ("tokens", TOKENS)],
        [("model", MODEL)],
        [("weight", "1.00")],
        MODEL,
    )
    sheet.text(14, 124, "a file of", SOFT, 9.5)
    sheet.text(14, 137, "EasyRef Save Tokens", SOFT, 9.5)
    saved = sheet.file(14, 146, "ann_00001_", TOKENS, 108)
    sheet.arrow(saved, (162, saved[1]), TOKENS)
    sheet.link(easyref["easyref"], inputs["easyref"], EASYREF)
    sheet.link(easyref["easyref"], applied["easyref"], EASYREF)
    sheet.link(tokens["tokens"], applied["tokens"], TOKENS)
    sheet.text(215, 198, "The MLLM is neither needed nor loaded.", SOFT, 10, "mm")
    sheet.save("load_tokens")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for draw in (loader, encode, apply, save_tokens, load_tokens):
        draw()


if __name__ == "__main__":
    main()
