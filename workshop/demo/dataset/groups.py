"""Groups of images that share one thing and differ in everything else.

Three kinds. Identity groups show one character in different scenes. In crowded identity groups a
friend stands beside it in every reference, a different one each time, so that only the character
is shared; the target, drawn first, shows the character alone. Style groups show one pattern and
palette on different shapes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

from PIL import Image, ImageDraw, ImageFilter

from ..canvas import Colour, mixed
from .characters import (
    ATTRIBUTES,
    PAINT,
    SHAPES,
    Identity,
    body_mask,
    draw_character,
    pattern_mask,
)
from .poses import Pose, alone, styled, together
from .scenes import Scene, draw_scene, random_scene

STYLE_PATTERNS = ("stripes", "dots", "checks", "rings")
# Each colour covers about half of the figure: with the colours exchanged they look alike.
EVEN_PATTERNS = ("stripes", "checks")
_INK: Colour = (40, 32, 44)


@dataclass(frozen=True, order=True)
class Style:
    """A pattern in two colours on a ground of a third."""

    pattern: str
    first: str
    second: str
    ground: str

    @property
    def look(self) -> Style:
        """Equal for styles that look alike."""
        if self.pattern not in EVEN_PATTERNS:
            return self
        first, second = sorted((self.first, self.second))
        return replace(self, first=first, second=second)


@dataclass(frozen=True)
class Drawn:
    """One image and its annotations.

    Attributes:
        caption: names the scene (or, in style groups, the shape) only.
        full_caption: names the character, or the style, too.
        outline: the character's edges, white on black.
        facts: attribute -> value, to evaluate with.
    """

    picture: Image.Image
    caption: str
    full_caption: str
    outline: Image.Image
    facts: dict[str, str]


def full_caption(caption: str, facts: Mapping[str, str]) -> str:
    """A caption that names the character, or the style, too.

    Args:
        caption: of the scene, or of the shape, only.
        facts: `Drawn.facts`.
    """
    if "ground" in facts:
        style = Style(*(facts[name] for name in ("pattern", "first", "second", "ground")))
        return f"{caption}, {style.first} with {style.second} {style.pattern} on {style.ground}"
    return f"{Identity(*(facts[name] for name in ATTRIBUTES)).words}, {caption}"


def draw_identity(
    identity: Identity,
    side: int,
    rng: random.Random,
    friend: Identity | None = None,
    scene: Scene | None = None,
    prominent_friend: bool = True,
) -> Drawn:
    """One character in a scene, at a random place, size and tilt.

    Args:
        friend: another character beside it; bigger, unless `prominent_friend` is false.
        scene: random when None.
    """
    scene = scene or random_scene(rng)
    picture = draw_scene(scene, side, rng)
    if friend is None:
        alpha = _paste(picture, _character(identity, side * 2), alone(rng))
    else:
        pair = (friend, identity) if prominent_friend else (identity, friend)
        alphas = [
            _paste(picture, _character(figure, side * 2), pose)
            for figure, pose in zip(pair, together(rng), strict=True)
        ]
        alpha = alphas[prominent_friend]
    caption = scene.words
    facts = {name: getattr(identity, name) for name in ATTRIBUTES}
    facts |= {"place": scene.place, "time": scene.time}
    return Drawn(picture, caption, full_caption(caption, facts), _edges(alpha), facts)


def draw_style(style: Style, shape: str, side: int, rng: random.Random) -> Drawn:
    """A shape in a style, on its plain ground."""
    picture = Image.new("RGB", (side, side), mixed(PAINT[style.ground], (255, 255, 255), 0.55))
    large = side * 2
    skin = Image.new("RGB", (large, large), PAINT[style.first])
    skin.paste(PAINT[style.second], mask=style_mask(style.pattern, large))
    body = body_mask(shape, large)
    grown = body.filter(ImageFilter.MaxFilter(2 * (large // 80) + 1))
    figure = Image.new("RGBA", (large, large))
    figure.paste(_INK, mask=grown)
    figure.paste(skin, mask=body)
    alpha = _paste(picture, figure, styled(rng))
    words = f"a {shape} shape"
    facts = {"shape": shape, "pattern": style.pattern, "first": style.first}
    facts |= {"second": style.second, "ground": style.ground}
    return Drawn(picture, words, full_caption(words, facts), _edges(alpha), facts)


def style_mask(pattern: str, side: int) -> Image.Image:
    """Mask of a style's second colour, [side, side] in mode L."""
    if pattern in ("stripes", "dots"):
        return pattern_mask(pattern, side)
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    step = side / 12
    for row in range(12):
        for column in range(12):
            corner = (column * step, row * step)
            if pattern == "checks" and (row + column) % 2:
                draw.rectangle((*corner, corner[0] + step, corner[1] + step), fill=255)
            elif pattern == "rings" and row % 2 and column % 2:
                box = (corner[0] - step * 0.6, corner[1] - step * 0.6)
                end = (corner[0] + step * 0.6, corner[1] + step * 0.6)
                draw.ellipse((*box, *end), outline=255, width=max(1, round(step * 0.35)))
    return mask


@lru_cache(maxsize=1)
def all_styles() -> tuple[Style, ...]:
    """All patterns in all triples of different colours, in a fixed order."""
    palettes = permutations(sorted(PAINT), 3)
    return tuple(Style(p, *colours) for colours in palettes for p in STYLE_PATTERNS)


def identity_group(
    identity: Identity,
    count: int,
    side: int,
    rng: random.Random,
    friends: Sequence[Identity] = (),
    prominent_friends: bool = True,
) -> list[Drawn]:
    """`count` images of a character; with `friends`, a different one of them stands beside it in
    all but the first. None shares more than one attribute with it.
    """
    strangers = [f for f in friends if strange(f, identity)]
    chosen = [None, *rng.sample(strangers, count - 1)] if friends else [None] * count
    return [
        draw_identity(identity, side, rng, friend, prominent_friend=prominent_friends)
        for friend in chosen
    ]


def style_group(style: Style, count: int, side: int, rng: random.Random) -> list[Drawn]:
    """`count` images of a style, on different shapes as long as there are enough."""
    shapes = list(SHAPES)
    rng.shuffle(shapes)
    return [draw_style(style, shapes[n % len(shapes)], side, rng) for n in range(count)]


@lru_cache(maxsize=16)
def _character(identity: Identity, side: int) -> Image.Image:
    """Cached for all images of a group; must not be drawn on."""
    return draw_character(identity, side)


def strange(one: Identity, other: Identity) -> bool:
    """Whether they share no more than one attribute."""
    return sum(getattr(one, n) == getattr(other, n) for n in ATTRIBUTES) <= 1


def _paste(picture: Image.Image, figure: Image.Image, pose: Pose) -> Image.Image:
    """Paste a figure at its pose; returns the pasted layer."""
    side = picture.width
    tilted = figure.rotate(pose.tilt, Image.Resampling.BICUBIC)
    small = tilted.resize((round(side * pose.scale),) * 2, Image.Resampling.LANCZOS)
    layer = Image.new("RGBA", picture.size)
    layer.paste(
        small, (round(pose.x * side - small.width / 2), round(pose.y * side - small.height / 2))
    )
    picture.paste(layer, mask=layer)
    return layer


def _edges(layer: Image.Image) -> Image.Image:
    """Edges of a layer: its outline and its inner lines, white on black."""
    flat = Image.new("RGB", layer.size, (255, 255, 255))
    flat.paste(layer, mask=layer)
    edges = flat.convert("L").filter(ImageFilter.FIND_EDGES)
    # The filter finds the image's own border, too.
    inside = Image.new("L", layer.size, 0)
    inside.paste(255, (2, 2, layer.width - 2, layer.height - 2))
    black = Image.new("L", layer.size, 0)
    thin = Image.composite(edges, black, inside)
    return thin.point(lambda level: 255 if level > 60 else 0).convert("RGB")
