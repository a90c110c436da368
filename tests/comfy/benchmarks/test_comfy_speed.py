"""make bench's measures of sampling, as far as they are fast: they run, and act on the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Behind everything else: the pack's folder `nodes` must not stand before ComfyUI's module.
sys.path.append(str(Path(__file__).resolve().parents[3]))

from benchmarks.speed.growth import SETTLED, growth
from benchmarks.speed.processes import IS_LINUX
from benchmarks.speed.sampling_memory import BAR, sampling_memory


def test_a_steps_memory_at_real_size_is_counted(comfyui: Path, tmp_path: Path) -> None:
    one, first, two, both = sampling_memory(comfyui, tmp_path)
    assert first.value == pytest.approx(42.6, rel=0.01)
    assert both.value == pytest.approx(2 * first.value)
    for amount, held in ((one, first), (two, both)):
        assert held.value < amount.value < held.value + 5
        assert amount.bar == BAR


@pytest.mark.skipif(not IS_LINUX, reason="the memory of a process is read as Linux tells it")
def test_prompts_are_run_one_after_the_other(comfyui: Path, tmp_path: Path) -> None:
    grown, _, settled, cached = growth(comfyui, tmp_path, SETTLED + 1)
    assert cached.value == 1
    assert abs(grown.value) < settled.value
    assert f"{SETTLED + 1} prompts" in grown.measure
