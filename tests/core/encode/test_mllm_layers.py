"""Weights of the MLLM's layers: presets, lists of any length, and what cannot be one."""

from __future__ import annotations

import itertools
from typing import Any

import goldens
import pytest

from easyref_core.encode.mllm_layers import PRESETS, MllmLayerWeights, parse_factors


def test_by_default_every_layer_counts_as_trained() -> None:
    weights = MllmLayerWeights()
    assert weights.factors(28) == ((1.0,) * 28,) * 2
    assert weights.attention == (1.0, 1.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_what_their_names_say(preset: str) -> None:
    weights = MllmLayerWeights(preset)
    (text, picture), (to_text, to_pictures) = weights.factors(5), weights.attention
    assert text == picture
    assert sum(text) == 5
    rises = {"early": -1, "late": 1}.get(preset, 0)
    assert all((b - a) * rises > 0 or a == b == 1 for a, b in itertools.pairwise(text))
    wanted = {"text-heavy": 2, "picture-heavy": 0.5}.get(preset, 1)
    assert to_text / to_pictures == wanted


def test_a_list_as_long_as_the_layers_is_taken_as_it_is() -> None:
    text, picture = (0.0, 0.3, 1.7), (1.0, 0.1, 0.2)
    assert MllmLayerWeights("even", text, picture).factors(3) == (text, picture)


def test_a_list_of_another_length_lies_evenly_over_the_layers() -> None:
    weights = MllmLayerWeights("even", (0.0, 2.0), (1.0, 0.0, 1.0))
    assert weights.factors(5) == ((0, 0.5, 1, 1.5, 2), (1, 0.5, 0, 0.5, 1))
    assert MllmLayerWeights("even", (1.0, 2.0, 3.0)).factors(1)[0] == (1.0,)


def test_factors_multiply_the_preset() -> None:
    found = MllmLayerWeights("early", (2.0,), (0.0,), 0.5).factors(3)
    assert found == ((3.5, 2.0, 0.5), (0.0, 0.0, 0.0))
    assert MllmLayerWeights("text-heavy", text_weight=0.5).attention == (1.0, 1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "loud"}, "no preset 'loud'"),
        ({"preset": 3}, "preset"),
        ({"text": ()}, "1 to 1000 factors"),
        ({"picture": (1.0,) * 1001}, "1 to 1000 factors"),
        ({"text": 1.0}, "1 to 1000 factors"),
        ({"text": (-0.5,)}, "from 0 to 10"),
        ({"text": (float("nan"),)}, "from 0 to 10"),
        ({"picture": ("1",)}, "from 0 to 10"),
        ({"picture_weight": 11}, "from 0 to 10"),
    ],
)
def test_what_is_no_factor_is_refused(given: dict[str, Any], said: str) -> None:
    with goldens.refused(said):
        MllmLayerWeights(**given)


def test_factors_are_read_from_text() -> None:
    assert parse_factors("1, 0.5,2", "text_layers") == (1.0, 0.5, 2.0)
    assert parse_factors(" \n", "text_layers") == (1.0,)


@pytest.mark.parametrize("given", ["1;2", "1,,2", "one", "1 2", "0:1", "\x1b[31m"])
def test_text_that_is_no_list_is_refused(given: str) -> None:
    with goldens.refused("text_layers", "commas between them"):
        parse_factors(given, "text_layers")
