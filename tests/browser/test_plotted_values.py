"""What the page's plots draw is what is computed."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from easyref_core.adapter.curves import WeightCurve
from easyref_core.adapter.stages import Window
from easyref_core.encode.mllm_layers import MllmLayerWeights, parse_factors
from easyref_core.errors import EasyRefError

SCRIPTS = Path(__file__).parents[2] / "web" / "js"
DRAW = """
import { outline, weightAt } from %s;
const [windows, places] = JSON.parse(process.argv[1]);
console.log(JSON.stringify(windows.map((window) =>
  [places.map((place) => weightAt(window, place)), outline(window)])));
"""
SPREAD = """
import { parseFactors, spread } from %s;
const texts = JSON.parse(process.argv[1]);
console.log(JSON.stringify(texts.map((text) => {
  const factors = parseFactors(text);
  return factors && spread(factors, 9);
})));
"""
LISTS = ("", " ", "1", "1, 0", "0.5,2 , 1", ", ".join(map(str, range(9))), "10, 0, 3, 7, 1, 2, 5")
NO_LISTS = ("a", "1,,2", "1;2", "1,", "-1", "1, nan", "1, 11", "1, Infinity")
WINDOWS = (
    Window(),
    Window(0.14, 0.36),
    Window(0, 0.36, 0.5, 0.2),
    Window(0.3, 0.35, -1, 0.2),
    Window(0.98, 1, 2, 0.1),
    Window(0.4, 0.4, 1, 0.1),
    Window(0.2, 0.6, 0),
)
PLACES = tuple(k / 40 for k in range(41))


def run(script: str, module: str, value: Any) -> Any:
    """What a script prints that imports one of the page's modules."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no Node.js on the PATH")
    source = script % json.dumps((SCRIPTS / module).as_uri())
    command = [program, "--input-type=module", "--eval", source, json.dumps(value)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(result.stdout)


def test_the_page_draws_the_weights_that_are_computed() -> None:
    drawn = run(DRAW, "windows.js", [[asdict(window) for window in WINDOWS], PLACES])
    for window, (weights, corners) in zip(WINDOWS, drawn, strict=True):
        assert weights == pytest.approx([window.at(place) for place in PLACES])
        if window.fade and not window.is_zero:  # the corners are joined by straight lines
            between = np.interp(PLACES, *np.array(corners).T)
            curve = WeightCurve(window.points)
            assert between == pytest.approx([curve.at(place) for place in PLACES])
        elif not window.is_zero:
            (start, _), *inside, (end, _) = corners
            assert (start, end) == (window.start, window.end)
            assert [weight for _, weight in inside] == [window.weight] * 2
        else:
            assert all(weight == 0 for _, weight in corners)


def test_the_page_spreads_factors_of_layers_as_they_are_computed() -> None:
    for text, drawn in zip(LISTS, run(SPREAD, "layer_factors.js", LISTS), strict=True):
        weights = MllmLayerWeights(text=parse_factors(text, "text_layers"))
        assert drawn == pytest.approx(weights.factors(9)[0]), text
    assert run(SPREAD, "layer_factors.js", NO_LISTS) == [None] * len(NO_LISTS)
    for text in NO_LISTS:
        with pytest.raises(EasyRefError):
            MllmLayerWeights(text=parse_factors(text, "text_layers"))
