"""Metrics and bars on invented scores: each bar can be missed, and by its own scores only."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.statistics import estimate
from easyref_core.pictures.preprocessing import picture_levels
from workshop.demo.dataset.characters import ATTRIBUTES, Identity
from workshop.demo.dataset.groups import draw_identity
from workshop.demo.evaluation.classifier import VALUES
from workshop.demo.evaluation.metrics import (
    Row,
    at_chance,
    chance_of,
    mean_of,
    rises,
)
from workshop.demo.evaluation.outlines import overlap, silhouette
from workshop.demo.evaluation.table import format_table, missed, write_scores, write_table
from workshop.demo.evaluation.table_rows import (
    COMPARED,
    FIRST,
    LOOK,
    OUTLINE,
    SCENE,
    SECOND,
    SHAPE,
    all_rows,
)

Results = dict[str, dict[str, list[float]]]
rows_of = partial(all_rows, looks=range(100))  # every style group shows another look


def share(part: float, count: int = 200) -> list[float]:
    """So large a part of ones, spread evenly."""
    return [float((n + 1) * part // 1 > n * part // 1) for n in range(count)]


def test_means_over_attributes_and_their_chance() -> None:
    assert mean_of({"a": [1.0, 0.0], "b": [0.0, 0.0], "c": [9.0, 9.0]}, ["a", "b"]) == [0.5, 0.0]
    assert chance_of({"a": "xy", "b": "xyzw"}, ["a", "b"]) == pytest.approx(0.375)
    assert chance_of(VALUES, ATTRIBUTES) == pytest.approx(0.1917, abs=1e-4)


@pytest.mark.parametrize(("value", "met"), [(0.2, True), (0.24, True), (0.3, False), (0.1, False)])
def test_chance_is_in_the_interval_or_near(value: float, met: bool) -> None:
    assert at_chance("x", estimate(share(value, 2000)), 0.2).met is met
    assert at_chance("x", estimate(share(0.3, 10)), 0.2).met


def test_a_rise_may_not_dip_nor_be_flat() -> None:
    steps = [share(part) for part in (0.2, 0.4, 0.6)]
    assert rises("x", steps).met
    assert rises("x", steps).note == "20.0 40.0 60.0"
    assert rises("x", [*steps, share(0.595)]).met
    assert not rises("x", [*steps[:2], share(0.35), *steps[2:]]).met
    assert not rises("x", [steps[0]] * 3).met
    assert not rises("x", steps[::-1]).met


@pytest.fixture
def good() -> Results:
    """Scores of 200 groups with which every bar is met."""

    def scores(identity: float, outline: float = 0.3) -> dict[str, list[float]]:
        found = {name: share(identity) for name in ATTRIBUTES}
        return found | {name: share(0.99) for name in SCENE} | {OUTLINE: [outline] * 200}

    # In order the colours are read by chance, which must not count.
    style = {name: share(0.85, 100) for name in (*LOOK, SHAPE)}
    style |= {name: share(0.5, 100) for name in (FIRST, SECOND)}
    return {
        "plain": scores(0.19),
        **{f"weight {w:g}": scores(0.2 + 0.76 * w) for w in (0, 0.25, 0.5, 0.75, 1)},
        "easyref": scores(0.96),
        "wrong": scores(0.9),
        "wrong own": scores(0.1),
        "control plain": scores(0.3, 0.7),
        "control easyref": scores(0.92, 0.68),
        "crowded 4": scores(0.8),
        "crowded 1": scores(0.4),
        "crowded average": scores(0.6),
        "style": style,
        "named": scores(0.97),
        "named style": dict(style),
    }


def titles(rows: list[Row]) -> list[str]:
    return [row.measure.strip() for row in rows]


def test_good_scores_meet_all_bars(good: Results) -> None:
    rows = rows_of(good)
    assert missed(rows) == []
    assert sum(row.met is True for row in rows) == 24
    assert len(set(titles(rows))) == len(rows)


@pytest.mark.parametrize(
    ("condition", "attributes", "part", "missing"),
    [
        ("easyref", ("pattern", "eyes"), 0.55, "identity, 4 references"),
        ("easyref", ("colour",), 0.94, "identity: colour"),
        ("easyref", ("accessory",), 0.94, "identity: accessory"),
        ("easyref", ("shape",), 0.74, "identity: shape"),
        ("named", ("pattern", "eyes"), 0.75, "prompt only: all that it names"),
        ("named", ("colour",), 0.94, "prompt only: colour"),
        ("named", ("accessory",), 0.94, "prompt only: accessory"),
        ("named", ("shape",), 0.74, "prompt only: shape"),
        ("named", SCENE, 0.96, "prompt only: place and time"),
        ("named style", LOOK, 0.75, "prompt only, style: pattern and palette"),
        ("named style", (SHAPE,), 0.75, "prompt only, style: shape"),
        ("plain", ATTRIBUTES, 0.3, "identity, no references"),
        ("plain", SCENE, 0.9, "place and time: with less without"),
        ("crowded 1", ATTRIBUTES, 0.6, "crowded: 4 less 1"),
        ("crowded average", ATTRIBUTES, 0.7, "crowded: joint less averaged"),
        ("wrong", ATTRIBUTES, 0.8, "wrong references: their identity"),
        ("wrong own", ATTRIBUTES, 0.3, "wrong references: own identity"),
        ("weight 0.5", ATTRIBUTES, 0.3, "identity at weight 0, 0.25, 0.5, 0.75, 1"),
        ("style", LOOK, 0.75, "style: pattern and palette"),
        ("style", (SHAPE,), 0.75, "style: shape that the prompt names"),
        ("control easyref", ATTRIBUTES, 0.9, "identity with ControlNet less without"),
    ],
)
def test_each_bar_is_missed_by_its_own_scores(
    good: Results, condition: str, attributes: tuple[str, ...], part: float, missing: str
) -> None:
    count = len(next(iter(good[condition].values())))
    good[condition] |= {name: share(part, count) for name in attributes}
    assert titles(missed(rows_of(good))) == [missing]


def test_the_outline_the_scene_and_the_count_have_bars_too(good: Results) -> None:
    good["control easyref"][OUTLINE] = [0.64] * 200
    assert titles(missed(rows_of(good))) == ["outline with EasyRef less without"]
    good["control easyref"][OUTLINE] = [0.66] * 200
    good["easyref"] |= {name: share(0.965) for name in SCENE}
    assert titles(missed(rows_of(good))) == ["place and time, 4 references"]
    fewer = {key: {n: s[:140] for n, s in scores.items()} for key, scores in good.items()}
    assert "identities judged" in titles(missed(rows_of(fewer)))


def test_groups_that_look_the_same_are_resampled_together(good: Results) -> None:
    rows = {row.measure.strip(): row for row in all_rows(good, [n // 5 for n in range(100)])}
    assert rows["styles judged"].note == "100 groups, 20 different looks"
    plain = {row.measure.strip(): row for row in rows_of(good)}
    for name in ("style: pattern and palette", "style: shape that the prompt names"):
        assert rows[name].found.value == pytest.approx(plain[name].found.value)
        assert rows[name].found != plain[name].found
    assert rows["identity, 4 references"] == plain["identity, 4 references"]


def test_a_set_without_controlnet_misses_both_of_its_bars(good: Results) -> None:
    del good["control plain"], good["control easyref"]
    rows = missed(rows_of(good))
    assert [row.note for row in rows] == ["the set has no ControlNet"] * 2


def test_missing_adapters_are_reported_as_missing(good: Results) -> None:
    assert sum("not given" in row.note for row in rows_of(good)) == len(COMPARED)
    good |= {"averaging easyref": good["plain"], "averaging crowded 4": good["crowded 1"]}
    rows = {row.measure.strip(): row for row in rows_of(good)}
    assert rows["crowded: joint less trained averaging"].found.value == pytest.approx(0.4)
    assert sum("not given" in row.note for row in rows.values()) == len(COMPARED) - 1


def test_the_table_and_the_file_agree(good: Results, tmp_path: Path) -> None:
    good["easyref"]["colour"] = share(0.5)
    rows = rows_of(good)
    lines = format_table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    colour = next(line for line in lines if "identity: colour" in line)
    assert colour.split()[2:] == ["50.0%", "43.0", "to", "57.0", "200", ">=", "95%", "MISSED"]
    joint = next(line for line in lines if "joint less averaged" in line)
    assert "+20.0 " in joint
    path = tmp_path / "new" / "check.json"
    write_table(path, rows, {"split": "held_out"})
    read = json.loads(path.read_text(encoding="utf-8"))
    assert (read["met"], read["split"], len(read["rows"])) == (False, "held_out", len(rows))
    write_scores(tmp_path / "scores.csv", good)
    scores = [line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines()]
    colours = [float(s) for c, a, _, s in scores[1:] if (c, a) == ("easyref", "colour")]
    assert colours == good["easyref"]["colour"]
    (tmp_path / "file").write_text("")
    with pytest.raises(EasyRefError, match="cannot be written"):
        write_table(tmp_path / "file" / "check.json", rows, {})


def test_an_image_overlaps_most_with_its_own_outline() -> None:
    rng = random.Random(4)
    shown = [
        draw_identity(Identity(shape, colour, "plain", eyes, "crown"), 128, rng)
        for shape, colour, eyes in (("star", "red", "goggle"), ("square", "blue", "sleepy"))
    ]
    pixels = torch.stack([picture_levels(one.picture) for one in shown])
    outlines = torch.stack([picture_levels(one.outline) for one in shown])
    own, other = overlap(pixels, outlines), overlap(pixels.flip(0), outlines)
    assert own.min() > 0.5
    assert other.max() < 0.45
    grey = torch.full_like(pixels, 128)
    assert overlap(grey, outlines).max() == 0
    filled = silhouette(outlines)
    assert 0.1 < float(filled.mean()) < 0.3
    assert filled[0, 0, 64, 64] == 1
    # What lies beyond the figure costs nothing.
    grown = torch.nn.functional.max_pool2d(filled, 21, 1, 10)
    elsewhere = torch.where(grown.bool(), pixels, torch.randint(256, pixels.shape).byte())
    assert torch.equal(overlap(elsewhere, outlines), own)
    assert overlap(pixels, torch.zeros_like(outlines)).max() == 0
