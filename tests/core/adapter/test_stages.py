"""Stages of the sampling: windows, their fades, presets and text."""

from __future__ import annotations

import math
from typing import Any

import goldens
import pytest
import torch

from easyref_core.adapter.curves import WeightCurve
from easyref_core.adapter.stages import PRESETS, Stages, Window, parse_stages
from easyref_core.untrusted import shown

PLACES = tuple(k / 400 for k in range(401))


def test_a_window_has_its_weight_from_start_to_end_and_none_outside() -> None:
    window = Window(0.25, 0.5, 0.8)
    found = [window.at(place) for place in (0.0, 0.2499, 0.25, 0.4, 0.5, 0.5001, 1.0)]
    assert found == [0.0, 0.0, 0.8, 0.8, 0.8, 0.0, 0.0]
    assert {Window().at(place) for place in PLACES} == {1.0}


def test_a_fade_is_a_ramp_around_each_boundary_within_the_sampling() -> None:
    window = Window(0.25, 0.75, 2.0, fade=0.25)
    places = (0.0, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    assert [window.at(p) for p in places] == [0.0, 0.0, 0.5, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0]
    whole = Window(fade=0.5)
    assert {whole.at(place) for place in PLACES} == {1.0}


@pytest.mark.parametrize("fade", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("boundary", [0.02, 0.36, 0.5, 0.97])
def test_stages_that_hand_over_at_a_boundary_add_up_to_their_weight(
    boundary: float, fade: float
) -> None:
    tokens, identity = Window(0, boundary, 0.7, fade), Window(boundary, 1, 0.7, fade)
    assert [tokens.at(p) + identity.at(p) for p in PLACES] == pytest.approx([0.7] * 401)
    short = Window(0.4, 0.45, 1, fade)  # shorter than its ramps
    around = Window(0, 0.4, 1, fade), Window(0.45, 1, 1, fade)
    assert [short.at(p) + sum(w.at(p) for w in around) for p in PLACES] == pytest.approx([1] * 401)
    assert all(0 <= short.at(p) <= 1 for p in PLACES)


@pytest.mark.parametrize(
    "window",
    [
        Window(0.3, 0.6, 1.0, 0.2),
        Window(0.1, 0.9, -0.5, 0.35),
        Window(0.3, 0.35, 2.0, 0.2),
        Window(0.0, 0.3, 1.0, 1.0),
        Window(0.98, 1.0, 1.0, 0.1),
    ],
)
def test_the_points_of_a_faded_window_are_its_weights(window: Window) -> None:
    curve = WeightCurve(window.points)
    assert [curve.at(p) for p in PLACES] == pytest.approx([window.at(p) for p in PLACES])
    half = window.fade / 2
    for place in PLACES:  # to the bit, so that nothing is computed there
        if place < window.start - half or place > window.end + half:
            assert curve.at(place) == window.at(place) == 0


@pytest.mark.parametrize("fade", [0.0, 0.2])
@pytest.mark.parametrize(("start", "end", "weight"), [(0.4, 0.4, 1), (0, 0, 1), (0.2, 0.8, 0)])
def test_an_empty_window_and_one_without_weight_are_zero(
    start: float, end: float, weight: float, fade: float
) -> None:
    window = Window(start, end, weight, fade)
    assert window.is_zero
    assert {window.at(place) for place in PLACES} == {0.0}
    assert not Window(0.4, 0.41, -0.1, fade).is_zero


def test_a_start_after_the_end_is_refused() -> None:
    with goldens.refused("start (0.5) is after its end (0.25)", "Swap them"):
        Window(0.5, 0.25)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True, 10.5])
def test_values_that_are_no_part_of_the_sampling_or_no_weight_are_refused(value: Any) -> None:
    for name, limits in (("start", "0 to 1"), ("end", "0 to 1"), ("fade", "0 to 1"),
                         ("weight", "-10 to 10")):  # fmt: skip
        with goldens.refused(f"The {name} of a window is {shown(value)}", limits):
            Window(**{name: value})


def test_presets_carry_the_papers_thresholds_to_sdxl() -> None:
    """Against torch's arithmetic: SDXL's noise schedule, and FLUX's shifted steps searched."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    sigmas = ((1 - kept) / kept).sqrt()
    assert sigmas[-1] < 0.95 / 0.05  # more noise than SDXL has: identity acts from the start
    same_noise = 1 - int((sigmas - 0.85 / 0.15).abs().argmin()) / 999
    steps = [k / 10000 for k in range(1, 10000)]
    flux = [math.exp(1.15) / (math.exp(1.15) + done / (1 - done)) for done in steps]
    shares = [steps[min(range(9999), key=lambda k: abs(flux[k] - t))] for t in (0.85, 0.95)]
    noise, step = PRESETS["noise"], PRESETS["steps"]
    assert noise == Stages(Window(0, round(same_noise, 2)), Window(0, 1))
    assert step == Stages(Window(0, round(shares[0], 2)), Window(round(shares[1], 2), 1))
    assert [noise.tokens.end, step.tokens.end, step.identity.start] == [0.18, 0.36, 0.14]


def test_stages_are_read_from_text() -> None:
    assert parse_stages("") is None
    assert parse_stages(" noise ") == PRESETS["noise"]
    assert parse_stages("0-0.36/0.14-1") == PRESETS["steps"]
    assert parse_stages("0.1 - .5 / 0 - 1") == Stages(Window(0.1, 0.5), Window(0, 1))


@pytest.mark.parametrize("written", ["early", "0-1", "0-1/0.5", "0-a/0-1", "0-1/0-1/0-1", "/", "-"])
def test_text_that_is_no_stages_is_refused(written: str) -> None:
    with goldens.refused(
        f"stages: {shown(written)}", "always, late, noise, steps", "0-0.36/0.14-1"
    ):
        parse_stages(written)


@pytest.mark.parametrize(
    ("written", "said"),
    [("0.5-0.2/0-1", "is after"), ("0-36/0-1", "from 0 to 1"), ("0-1/nan-1", "from 0 to 1")],
)
def test_windows_that_cannot_be_are_refused_in_text_too(written: str, said: str) -> None:
    with goldens.refused(said):
        parse_stages(written)


@pytest.mark.parametrize("value", [None, 5, ["noise"]])
def test_stages_that_are_no_text_are_refused(value: Any) -> None:
    with goldens.refused("stages is", "must be a text"):
        parse_stages(value)
