"""Draws docs/icon.png and docs/banner.png, which the registry and ComfyUI-Manager show.

    python -m workshop.pages.make_icon

Several pictures of one drawn character flow together into 64 tokens, and these become a new
picture of it. Drawn twice as large and then reduced, for smooth edges.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from workshop.demo.dataset.characters import Identity, draw_character
from workshop.demo.dataset.scenes import Scene, draw_scene

OUT = Path(__file__).resolve().parents[2] / "docs"
ICON_SIDE = 400
BANNER_SIZE = (1680, 720)
ZOOM = 2

WHO = Identity("star", "orange", "belly", "goggle", "crown")
GIVEN = (Scene("meadow", "day"), Scene("sea", "day"), Scene("desert", "day"), Scene("city", "day"))
MADE = Scene("snow", "sunset")

TOP, BOTTOM = (58, 70, 128), (24, 27, 56)
GLOW = (255, 200, 87)
TEXT, SOFT = (240, 242, 248), (176, 182, 198)
EDGE = (250, 250, 252)

Point = tuple[float, float]


def ground(size: tuple[int, int], light: Point, reach: float) -> Image.Image:
    """The background: dark, with a warm light at one place."""
    width, height = size
    shade = Image.linear_gradient("L").resize(size)
    image = Image.composite(Image.new("RGB", size, BOTTOM), Image.new("RGB", size, TOP), shade)
    glow = Image.new("L", (width // 8, height // 8))
    x, y, r = light[0] / 8, light[1] / 8, reach / 8
    ImageDraw.Draw(glow).ellipse((x - r, y - r, x + r, y + r), fill=110)
    glow = glow.filter(ImageFilter.GaussianBlur(r / 1.6)).resize(size, Image.Resampling.BICUBIC)
    image.paste(Image.new("RGB", size, GLOW), mask=glow)
    return image


def card(
    scene: Scene, side: int, pose: tuple[float, float, float, float], seed: int
) -> Image.Image:
    """The character in a scene, with a white edge and round corners.

    Args:
        pose: x and y of its middle and its size, in shares of the side, and its tilt in degrees.
    """
    x, y, scale, tilt = pose
    picture = draw_scene(scene, side, random.Random(seed)).convert("RGB")
    figure = draw_character(WHO, round(side * scale)).rotate(tilt, Image.Resampling.BICUBIC)
    corner = (round(side * x - figure.width / 2), round(side * y - figure.height / 2))
    picture.paste(figure, corner, figure)
    edge = round(side * 0.035)
    whole = Image.new("RGBA", (side + 2 * edge,) * 2)
    ImageDraw.Draw(whole).rounded_rectangle(
        (0, 0, whole.width - 1, whole.height - 1), radius=side * 0.1, fill=EDGE
    )
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), side * 0.075, fill=255)
    whole.paste(picture, (edge, edge), mask)
    return whole


def put(image: Image.Image, what: Image.Image, middle: Point, tilt: float = 0) -> None:
    """Put a card there, with its shadow."""
    margin = what.width // 4
    layer = Image.new("RGBA", (what.width + 2 * margin,) * 2)
    layer.paste(what, (margin, margin))
    layer = layer.rotate(tilt, Image.Resampling.BICUBIC)
    corner = (round(middle[0] - layer.width / 2), round(middle[1] - layer.height / 2))
    blur = what.width * 0.045
    shadow = layer.getchannel("A").filter(ImageFilter.GaussianBlur(blur)).point(lambda a: a * 0.6)
    image.paste((6, 6, 12), (corner[0], corner[1] + round(blur / 1.5)), shadow)
    image.paste(layer, corner, layer)


def flow(image: Image.Image, starts: Sequence[Point], end: Point, width: float) -> None:
    """Curves of light from the starts that meet at the end."""
    light = Image.new("L", image.size)
    draw = ImageDraw.Draw(light)
    for x, y in starts:
        bend = (x + end[0]) / 2
        points = []
        for step in range(81):
            t = step / 80
            a, b, c, d = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
            points.append((a * x + (b + c) * bend + d * end[0], (a + b) * y + (c + d) * end[1]))
        for (x0, y0), (x1, y1) in pairwise(points):
            draw.line((x0, y0, x1, y1), fill=210, width=round(width))
            r = width / 2
            draw.ellipse((x1 - r, y1 - r, x1 + r, y1 + r), fill=210)
    for blur, strength in ((width * 1.6, 0.8), (0, 0.9)):
        mask = light.filter(ImageFilter.GaussianBlur(blur)).point(lambda v, s=strength: v * s)
        image.paste(Image.new("RGB", image.size, GLOW), mask=mask)


def tokens(image: Image.Image, middle: Point, side: float) -> None:
    """64 small squares, the brighter the nearer to their middle."""
    draw = ImageDraw.Draw(image)
    step = side / 8
    r = side * 0.57
    box = (middle[0] - r, middle[1] - r, middle[0] + r, middle[1] + r)
    draw.rounded_rectangle(
        box, radius=side * 0.1, fill=BOTTOM, outline=GLOW, width=round(side / 60)
    )
    for row in range(8):
        for column in range(8):
            x = middle[0] - side / 2 + column * step
            y = middle[1] - side / 2 + row * step
            away = max(abs(column - 3.5), abs(row - 3.5)) / 3.5
            colour = tuple(round(g + (255 - g) * 0.6 * (1 - away)) for g in GLOW)
            box = (x + step * 0.14, y + step * 0.14, x + step * 0.86, y + step * 0.86)
            draw.rounded_rectangle(box, radius=step * 0.18, fill=colour)


def icon() -> Image.Image:
    side = ICON_SIDE * ZOOM
    image = ground((side, side), (side / 2, side * 0.55), side * 0.3)
    poses = ((0.5, 0.55, 0.95, 8), (0.5, 0.55, 0.95, -8), (0.5, 0.55, 0.95, 0))
    places = ((0.215, 0.285, 13), (0.785, 0.285, -13), (0.5, 0.215, 0))
    for number, (pose, (x, y, tilt)) in enumerate(zip(poses, places, strict=True)):
        small = card(GIVEN[number], round(side * 0.3), pose, number + 3)
        put(image, small, (side * x, side * y), tilt)
    large = card(MADE, round(side * 0.53), (0.5, 0.54, 0.98, 0), 14)
    put(image, large, (side * 0.5, side * 0.66))
    return image


def banner() -> Image.Image:
    width, height = (number * ZOOM for number in BANNER_SIZE)
    meeting = (width * 0.523, height * 0.5)
    image = ground((width, height), meeting, height * 0.34)
    places = ((0.105, 0.29, 7), (0.275, 0.25, -6), (0.12, 0.74, -6), (0.29, 0.73, 7))
    starts = [(width * (x + 0.05), height * y) for x, y, _ in places]
    flow(image, starts, (meeting[0], meeting[1]), height * 0.006)
    flow(image, [meeting], (width * 0.7, height * 0.5), height * 0.009)
    poses = (
        (0.5, 0.55, 0.95, 10),
        (0.46, 0.56, 0.8, -12),
        (0.54, 0.55, 0.9, 4),
        (0.5, 0.55, 1.0, -6),
    )
    for number, (pose, (x, y, tilt)) in enumerate(zip(poses, places, strict=True)):
        small = card(GIVEN[number], round(height * 0.37), pose, number + 3)
        put(image, small, (width * x, height * y), tilt)
    tokens(image, meeting, height * 0.2)
    large = card(MADE, round(height * 0.68), (0.5, 0.54, 0.98, 0), 14)
    put(image, large, (width * 0.815, height * 0.5), -2)
    draw = ImageDraw.Draw(image)
    for text, y, size, colour in (
        ("EasyRef", 0.23, 0.115, TEXT),
        ("a group of pictures as one reference", 0.745, 0.03, SOFT),
    ):
        font = ImageFont.load_default(height * size)
        draw.text((meeting[0], height * y), text, fill=colour, font=font, anchor="mm")
    return image


def main() -> None:
    for name, image in (("icon", icon()), ("banner", banner())):
        small = image.resize((image.width // ZOOM, image.height // ZOOM), Image.Resampling.LANCZOS)
        path = OUT / f"{name}.png"
        small.save(path, optimize=True)
        print(path, small.size, path.stat().st_size)


if __name__ == "__main__":
    main()
