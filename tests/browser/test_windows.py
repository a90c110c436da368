"""The windows that the page draws are those that are computed."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from easyref_core.adapter.curves import WeightCurve
from easyref_core.adapter.stages import Window

SCRIPT = Path(__file__).parents[2] / "web" / "js" / "windows.js"
DRAW = """
import { outline, weightAt } from %s;
const [windows, places] = JSON.parse(process.argv[1]);
console.log(JSON.stringify(windows.map((window) =>
  [places.map((place) => weightAt(window, place)), outline(window)])));
"""
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


def test_the_page_draws_the_weights_that_are_computed() -> None:
    program = shutil.which("node")
    if program is None:
        pytest.skip("no Node.js on the PATH")
    given = json.dumps([[asdict(window) for window in WINDOWS], PLACES])
    command = [program, "--input-type=module", "--eval", DRAW % json.dumps(SCRIPT.as_uri()), given]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for window, (weights, corners) in zip(WINDOWS, json.loads(result.stdout), strict=True):
        assert weights == pytest.approx([window.at(place) for place in PLACES])
        if window.fade and not window.is_zero:  # the corners are joined by straight lines
            drawn = np.interp(PLACES, *np.array(corners).T)
            curve = WeightCurve(window.points)
            assert drawn == pytest.approx([curve.at(place) for place in PLACES])
        elif not window.is_zero:
            (start, _), *inside, (end, _) = corners
            assert (start, end) == (window.start, window.end)
            assert [weight for _, weight in inside] == [window.weight] * 2
        else:
            assert all(weight == 0 for _, weight in corners)
