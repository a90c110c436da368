"""Stages and identity in the benchmark's sampler, against ComfyUI's percent and direct use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_methods import generate, load, pixels

from easyref_core.evaluation.methods.easyref import EasyRefMethod
from easyref_core.evaluation.methods.settings import GenerationSettings
from easyref_core.evaluation.trials import Trial
from easyref_core.sdxl_diffusers.unet_layers import attached

MakeTrial = Callable[..., Trial]


@pytest.fixture
def method(settings: GenerationSettings, make_trial: MakeTrial) -> Iterator[EasyRefMethod]:
    found = load(settings, make_trial("easyref"))
    yield found
    found.close()


def scales(method: EasyRefMethod, trial: Trial, work: Path) -> list[tuple[int, float]]:
    """Timestep and weight of the tokens in each call of the UNet."""
    unet, found = method._base.pipe.unet, []

    def note(_: Any, args: tuple) -> None:
        found.append((int(args[1]), attached(unet).scale))

    hook = unet.register_forward_pre_hook(note)
    try:
        generate(method, work, trial)
    finally:
        hook.remove()
    return found


def percent_to_sigma(percent: float, alphas: torch.Tensor) -> float:
    """As ComfyUI has it for SDXL."""
    if not 0 < percent < 1:
        return 999999999.9 if percent <= 0 else 0.0
    logs = (((1 - alphas) / alphas) ** 0.5).log().double()
    place = (1 - percent) * 999.0
    low = math.floor(place)
    return math.exp(torch.lerp(logs[low], logs[math.ceil(place)], place - low))


@pytest.mark.parametrize("stages", ["0-0.36/0.14-1", "0.2-0.8/0-1", "0.5-1/0-1", "noise"])
def test_tokens_act_at_the_steps_that_lie_within_comfyuis_percent(
    stages: str, method: EasyRefMethod, make_trial: MakeTrial, tmp_path: Path
) -> None:
    text = {"noise": "0-0.18/0-1"}.get(stages, stages).partition("/")[0]
    start, end = map(float, text.split("-"))
    trial = make_trial("easyref", weight=0.7, steps=10, stages=stages)
    found = scales(method, trial, tmp_path)
    alphas = method._base.pipe.scheduler.alphas_cumprod
    first, last = (percent_to_sigma(percent, alphas) for percent in (start, end))
    sigmas = [float(((1 - alphas[t]) / alphas[t]) ** 0.5) for t, _ in found]
    assert [scale for _, scale in found] == [0.7 if last <= s <= first else 0.0 for s in sigmas]
    assert len(found) == 10
    assert {scale for _, scale in found} == {0.0, 0.7}


def test_stages_of_the_whole_sampling_change_nothing_and_empty_ones_leave_the_lora(
    method: EasyRefMethod, make_trial: MakeTrial, tmp_path: Path
) -> None:
    def made(**fields: Any) -> list[bytes]:
        return pixels(generate(method, tmp_path, make_trial("easyref", steps=3, **fields)))

    always, never, first = made(), made(weight=0.0), made(stages="0-0.5/0-1")
    assert len({*always, *never, *first}) == 3
    assert made(stages="0-1/0-1") == always
    assert made(stages="0-0/0-1") == never
