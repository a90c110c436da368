"""Weight curves: shapes and points."""

from __future__ import annotations

from typing import Any

import goldens
import numpy as np
import pytest
import torch

from easyref_core.adapter.curves import WeightCurve, curve_points
from easyref_core.untrusted import shown


def custom(text: str) -> WeightCurve:
    return WeightCurve(curve_points("custom points", 1.0, 1.0, text))


@pytest.mark.parametrize(
    ("shape", "middle", "quarter"),
    [
        ("linear", 0.6, 0.4),
        ("ease in", 0.4, 0.25),
        ("ease out", 0.8, 0.55),
        ("ease in-out", 0.6, 0.325),
    ],
)
def test_shapes_go_from_start_to_end(shape: str, middle: float, quarter: float) -> None:
    curve = WeightCurve(curve_points(shape, 0.2, 1.0, ""))
    assert curve.at(0.0) == 0.2
    assert curve.at(1.0) == pytest.approx(1.0)
    assert curve.at(0.5) == pytest.approx(middle)
    assert curve.at(0.25) == pytest.approx(quarter)


def test_points_are_joined_by_straight_lines_and_level_outside() -> None:
    curve = custom(" 0.2:1 ,0.6 : -0.5,\n0.8:2, ")
    assert curve.points == ((0.2, 1.0), (0.6, -0.5), (0.8, 2.0))
    result = [curve.at(p) for p in (0.0, 0.2, 0.4, 0.6, 0.7, 1.0)]
    assert result == pytest.approx([1.0, 1.0, 0.25, -0.5, 0.75, 2.0])
    assert custom("0.3:2").at(0.9) == 2.0
    with pytest.raises(AttributeError):
        curve.points = ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no point"),
        (" , ", "there is no point"),
        ("0:1, 0.7:1, 0.5:0", "0.5 comes after the one at 0.7"),
        ("0:1, 0.5:1, 0.5:0", "0.5 comes after the one at 0.5"),
        ("0:1, 1.5:0", "a place is 1.5; it must be a number from 0 to 1"),
        ("-0.1:1", "a place is -0.1; it must be a number from 0 to 1"),
        ("0:1, half:2", "'half:2' is not a point"),
        ("0:1, 0.5", "'0.5' is not a point"),
        ("0:1:2", "'0:1:2' is not a point"),
        ("0:nan", "the factor at 0 is nan"),
        ("0:1, 1:1e30", "the factor at 1 is 1e+30; it must be a number from -10 to 10"),
        ("0:inf", "the factor at 0 is inf"),
    ],
)
def test_text_that_is_no_points_is_refused(text: str, message: str) -> None:
    with goldens.refused("points:", message):
        custom(text)


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    with goldens.refused("'square'", "linear", "custom points"):
        curve_points("square", 0.0, 1.0, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 11, "1", None, True])
def test_values_of_a_shape_that_are_no_factors_are_refused(value: Any) -> None:
    with goldens.refused(f"start_value is {shown(value)}", "from -10 to 10"):
        curve_points("ease in", value, 1.0, "")
    with goldens.refused(f"end_value is {shown(value)}"):
        curve_points("linear", 0.0, value, "")


@pytest.mark.parametrize(
    "points", [None, 5, "0:1", [], [(0, 1, 2)], [0, 1], [("0", 1)], [(0, "1")]]
)
def test_points_of_other_types_are_refused(points: Any) -> None:
    with goldens.refused("points"):
        WeightCurve(points)
    with goldens.refused("points is nothing"):
        curve_points("custom points", 0.0, 1.0, None)


def test_points_become_plain_numbers() -> None:
    curve = WeightCurve([[np.int64(0), np.float32(1)], [torch.tensor(1.0), 0]])
    assert curve == WeightCurve(((0.0, 1.0), (1.0, 0.0)))
    assert hash(curve) == hash(WeightCurve(((0.0, 1.0), (1.0, 0.0))))
