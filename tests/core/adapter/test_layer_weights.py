"""Weights for SDXL's groups of layers, and their profiles."""

from __future__ import annotations

from typing import Any

import goldens
import pytest

from easyref_core.adapter.layer_weights import PROFILES, LayerWeights
from easyref_core.untrusted import shown


def test_every_profile_differs_and_all_is_everything() -> None:
    assert next(iter(PROFILES)) == "all"
    assert PROFILES["all"] == LayerWeights()
    assert len({weights.factors for weights in PROFILES.values()}) == len(PROFILES) == 5
    with pytest.raises(AttributeError):
        PROFILES["style"].factors = ()


@pytest.mark.parametrize("weights", [{"input_9": 1}, {"OUTPUT_1": 0.5}, {"up_blocks": 0}])
def test_an_unknown_group_is_refused_with_the_known_ones(weights: dict[str, Any]) -> None:
    with goldens.refused(next(iter(weights)), "input_4", "middle", "output_5"):
        LayerWeights(weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_a_weight_that_is_no_number_is_refused(value: Any) -> None:
    with goldens.refused("middle", shown(value)):
        LayerWeights({"middle": value})
