"""The drawn data set: shared attributes, captions, held-out identities and styles."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from easyref_core.errors import EasyRefError
from easyref_core.training.config import DataSettings
from easyref_core.training.records import read_records
from easyref_core.training.samples import make_sample
from workshop.demo.dataset import groups
from workshop.demo.dataset.characters import (
    ACCESSORIES,
    ATTRIBUTES,
    COLOURS,
    EYES,
    PATTERNS,
    SHAPES,
    Identity,
    all_identities,
    draw_character,
)
from workshop.demo.dataset.files import (
    KINDS,
    DatasetOptions,
    draw_group,
    write_dataset,
)
from workshop.demo.dataset.groups import (
    STYLE_PATTERNS,
    Style,
    all_styles,
    draw_identity,
    draw_style,
    style_group,
    style_mask,
)
from workshop.demo.dataset.scenes import PLACES, TIMES, Scene, draw_scene
from workshop.demo.dataset.splits import identities, styles

PLAIN = Identity("round", "red", "plain", "beady", "crown")
SPOTTED = Style("dots", "blue", "pink", "yellow")
SMALL = DatasetOptions(groups=10, held_out_groups=5, pictures=3, side=64)
VALUES = dict(zip(ATTRIBUTES, (SHAPES, COLOURS, PATTERNS, EYES, ACCESSORIES), strict=True))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Share of pixels that differ clearly."""
    red, green, blue = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).split()
    levels = ImageChops.lighter(red, ImageChops.lighter(green, blue))
    return sum(levels.histogram()[25:]) / (one.width * one.height)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_all_values_of_an_attribute_are_visible(attribute: str) -> None:
    drawn = {v: draw_character(replace(PLAIN, **{attribute: v}), 96) for v in VALUES[attribute]}
    for one, other in combinations(drawn.values(), 2):
        assert difference(one, other) > 0.004


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accessory", ACCESSORIES)
def test_nothing_is_cut_off(shape: str, accessory: str) -> None:
    character = draw_character(replace(PLAIN, shape=shape, accessory=accessory), 128)
    left, top, right, bottom = character.getchannel("A").point(lambda v: 255 * (v > 40)).getbbox()
    assert min(left, top) > 0
    assert max(right, bottom) < 128


def test_held_out_identities_are_no_training_identities() -> None:
    training, held_out = identities()
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(all_identities())
    assert len(held_out) == pytest.approx(0.15 * len(all_identities()), abs=1)
    for attribute, values in VALUES.items():
        counts = [sum(getattr(i, attribute) == v for i in training) for v in values]
        assert min(counts) > 100


def test_held_out_styles_look_like_no_training_style() -> None:
    training, held_out = styles()
    assert not {style.look for style in training} & {style.look for style in held_out}
    assert len(training) == pytest.approx(0.85 * len(all_styles()), abs=1)
    for colour in COLOURS:
        assert min(sum(getattr(s, n) == colour for s in training) for n in ("first", "ground")) > 50
    # All patterns equally often, and each style before any of its pattern comes again.
    assert [style.pattern for style in held_out] == [*STYLE_PATTERNS] * (len(held_out) // 4)
    assert len(held_out) > 160
    for start in range(len(STYLE_PATTERNS)):
        alike = held_out[start::4]
        assert alike == tuple(alike[n % len(set(alike))] for n in range(len(alike)))


@pytest.mark.parametrize("pattern", STYLE_PATTERNS)
def test_even_patterns_look_alike_with_colours_exchanged(pattern: str) -> None:
    mask = style_mask(pattern, 256)
    share = mask.histogram()[255] / 256**2
    one, other = Style(pattern, "blue", "pink", "yellow"), Style(pattern, "pink", "blue", "yellow")
    assert (one.look == other.look) == (0.4 < share < 0.6)
    assert one.look != Style(pattern, "blue", "pink", "red").look


@pytest.mark.parametrize("part", ["training", "held_out"])
def test_a_friend_is_a_training_identity_in_all_pictures_but_the_target(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_with: list[tuple[Identity, Identity | None, bool]] = []

    def note(
        identity: Identity,
        side: int,
        rng: random.Random,
        friend: Identity | None,
        prominent_friend: bool,
    ) -> None:
        drawn_with.append((identity, friend, prominent_friend))

    monkeypatch.setattr(groups, "draw_identity", note)
    training, held_out = identities()
    bigger = []
    for number in (2, 3, 7, 8):
        drawn_with.clear()
        assert draw_group(replace(SMALL, pictures=6), part, number)[0] == "crowded"
        (shown,), friends = (
            {identity for identity, _, _ in drawn_with},
            [friend for _, friend, _ in drawn_with],
        )
        assert shown in (training if part == "training" else held_out)
        assert friends[0] is None
        assert len(set(friends[1:])) == 5
        assert set(friends[1:]) <= set(training)
        for friend in friends[1:]:
            assert sum(getattr(friend, a) == getattr(shown, a) for a in ATTRIBUTES) <= 1
        bigger.append({prominent for _, _, prominent in drawn_with})
    sometimes = [{True}, {False}] * 2
    assert bigger == (sometimes if part == "training" else [{True}] * 4)


def test_a_prominent_friend_is_the_bigger_figure() -> None:
    friend = Identity("square", "blue", "dots", "goggle", "scarf")

    def height(seed: int, prominent: bool) -> int:
        drawn = draw_identity(
            PLAIN, 96, random.Random(seed), friend, Scene("beach", "day"), prominent
        )
        _, top, _, bottom = drawn.outline.getbbox()
        return bottom - top

    for seed in range(4):
        assert height(seed, True) < 0.9 * height(seed, False)


def test_captions_name_the_scene_only() -> None:
    rng = random.Random(3)
    scene = Scene("beach", "night")
    drawn = draw_identity(PLAIN, 64, rng, scene=scene)
    assert drawn.caption == "on a beach at night"
    assert not any(value in drawn.caption for values in VALUES.values() for value in values)
    assert all(getattr(PLAIN, a) in drawn.full_caption for a in ("shape", "colour", "accessory"))
    assert drawn.facts["place"] == "beach"
    assert drawn.facts["colour"] == "red"


def test_style_captions_name_the_shape_only() -> None:
    drawn = draw_style(SPOTTED, "star", 64, random.Random(3))
    assert drawn.caption == "a star shape"
    assert all(word in drawn.full_caption for word in ("dots", "blue", "pink", "yellow"))


def test_the_colours_of_a_style_differ() -> None:
    assert all(len({s.first, s.second, s.ground}) == 3 for s in all_styles())
    assert len(set(all_styles())) == len(STYLE_PATTERNS) * 8 * 7 * 6


def test_style_groups_show_different_shapes() -> None:
    group = style_group(SPOTTED, 5, 48, random.Random(1))
    assert len({d.facts["shape"] for d in group}) == 5
    assert len({(d.facts["pattern"], d.facts["first"], d.facts["ground"]) for d in group}) == 1


@pytest.mark.parametrize("pattern", STYLE_PATTERNS)
def test_styles_show_both_colours(pattern: str) -> None:
    style = replace(SPOTTED, pattern=pattern)
    colours = draw_style(style, "square", 96, random.Random(0)).picture.quantize(8).getcolors()
    assert sum(count > 60 for count, _ in colours) >= 4  # ground, edge and both colours


def test_scenes_differ_in_place_and_time() -> None:
    drawn = {
        (place, time): draw_scene(Scene(place, time), 64, random.Random(0))
        for place in PLACES
        for time in TIMES
    }
    for one, other in combinations(drawn.values(), 2):
        assert difference(one, other) > 0.02
    assert len({Scene(place, time).words for place, time in drawn}) == len(drawn)


def test_outlines_are_where_the_character_is() -> None:
    drawn = draw_identity(PLAIN, 96, random.Random(2), scene=Scene("snow", "day"))
    edges = drawn.outline.convert("L")
    left, top, right, bottom = edges.getbbox()
    assert right - left > 25
    assert bottom - top > 25
    white = edges.histogram()[255] / 96**2
    assert 0.01 < white < 0.3


def test_a_group_depends_on_its_seed_and_number_only() -> None:
    def pixels(options: DatasetOptions, split: str, number: int) -> str:
        _, drawn = draw_group(options, split, number)
        return hashlib.sha256(b"".join(d.picture.tobytes() for d in drawn)).hexdigest()

    first = pixels(SMALL, "training", 3)
    assert first == pixels(replace(SMALL, groups=99), "training", 3)
    others = {pixels(SMALL, "training", 4), pixels(SMALL, "held_out", 3)}
    assert first not in others | {pixels(replace(SMALL, seed=1), "training", 3)}


def test_groups_take_identities_and_styles_in_turn() -> None:
    shown: dict[str, set[tuple[str, ...]]] = {kind: set() for kind in KINDS}
    tiny = replace(SMALL, side=32, pictures=2)
    for number in range(20):
        kind, (first, *_) = draw_group(tiny, "training", number)
        names = ("pattern", "first", "second", "ground") if kind == "style" else ATTRIBUTES
        shown[kind].add(tuple(first.facts[name] for name in names))
    assert {kind: len(values) for kind, values in shown.items()} == {
        "identity": 8,
        "crowded": 8,
        "style": 4,
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("drawn") / "set", SMALL, workers=2)


def test_the_lists_are_training_records(dataset: Path) -> None:
    settings = DataSettings(("x",), resolution=64, crop="center", image_size=56)
    # Four of ten groups are crowded: only their targets show one figure alone.
    for name, count in (("groups", 10), ("held_out", 5), ("single", 10), ("captions", 22)):
        records = read_records([dataset / f"{name}.json"], dataset)
        assert len(records) == count
        for position, record in enumerate(records):
            assert make_sample(record, settings, 0, position).target.shape == (3, 64, 64)


def test_all_kinds_and_facts_are_written(dataset: Path) -> None:
    facts = json.loads((dataset / "facts.json").read_text())
    assert {f["kind"] for f in facts.values()} == set(KINDS)
    pictures = [p for p in dataset.rglob("*_?.png") if "outline" not in p.name]
    assert {str(p.relative_to(dataset).as_posix()) for p in pictures} == set(facts)
    assert (dataset / "overview.png").is_file()


def test_no_training_image_shows_a_held_out_identity(dataset: Path) -> None:
    _, held_out = identities()
    facts = json.loads((dataset / "facts.json").read_text())
    for name, fact in facts.items():
        if fact["kind"] != "style":
            identity = Identity(**{a: fact[a] for a in ATTRIBUTES})
            assert (identity in held_out) == name.startswith("held_out/")


@pytest.mark.parametrize(
    "wrong", [{"groups": 0}, {"held_out_groups": 0}, {"side": 8}, {"pictures": 1}, {"pictures": 99}]
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(EasyRefError):
        write_dataset(tmp_path / "new", replace(SMALL, **wrong))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(EasyRefError, match="is not empty"):
        write_dataset(tmp_path, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
