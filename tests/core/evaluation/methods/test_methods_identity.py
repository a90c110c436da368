"""Identity in the benchmark: what a pipeline computes with it, its stages, and its wrong group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generation_methods import generate, images, load, pixels
from PIL import Image

from easyref_core import attach_adapter, load_checkpoint, set_tokens
from easyref_core.evaluation.methods.easyref import EasyRefMethod
from easyref_core.evaluation.methods.load import load_methods
from easyref_core.evaluation.methods.pipeline import GenerationPipeline
from easyref_core.evaluation.methods.settings import NEGATIVE, GenerationSettings
from easyref_core.evaluation.trials import Trial
from easyref_core.sdxl_diffusers import identity
from easyref_core.sdxl_diffusers.identity_latents import encode_identity

MakeTrial = Callable[..., Trial]


@pytest.fixture
def method(settings: GenerationSettings, make_trial: MakeTrial) -> Iterator[EasyRefMethod]:
    found = load(settings, make_trial("easyref"))
    yield found
    found.close()


def difference(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max())


def test_identity_alone_is_what_a_pipeline_computes(
    tiny: Any,
    settings: GenerationSettings,
    method: EasyRefMethod,
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    trial = make_trial("easyref", weight=0.0, identity=0.8)
    (result,) = generate(method, tmp_path, trial)
    assert result.seconds["encode"] > 0
    assert not (tmp_path / "tokens").exists()  # the MLLM reads nothing
    own = GenerationPipeline(settings).pipe
    attach_adapter(own.unet, load_checkpoint(tiny.adapter))
    set_tokens(own.unet, None)
    identity.attach_identity(own.unet)
    pictures = [reference.source.open() for reference in trial.references]
    run = identity.identity_run(own, encode_identity(own, pictures, 64, 64), 0.8)
    wanted = own(
        trial.prompt,
        negative_prompt=NEGATIVE,
        height=64,
        width=64,
        num_inference_steps=trial.variant.steps,
        guidance_scale=trial.variant.guidance,
        generator=torch.Generator().manual_seed(trial.seed),
        cross_attention_kwargs={"identity": run},
    ).images[0]
    assert difference(images([result])[0], wanted) <= 1


def test_identity_works_in_sixteen_bits(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trial = make_trial("easyref", identity=1.0, stages="steps")
    found = load(replace(settings, dtype="bfloat16"), trial)
    generate(found, tmp_path, trial)
    found.close()


def test_each_group_of_a_batch_attends_to_its_own_references(
    method: EasyRefMethod, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trials = [
        make_trial("easyref", group, seed=3, count=count, identity=1.0)
        for group, count in ((0, 2), (1, 1))
    ]
    together = images(generate(method, tmp_path, *trials))
    for trial, image in zip(trials, together, strict=True):
        assert difference(images(generate(method, tmp_path, trial))[0], image) <= 2


def test_identity_acts_in_its_stage_alone_and_is_gone_afterwards(
    method: EasyRefMethod,
    make_trial: MakeTrial,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []
    make_run = identity.identity_run

    def noted(*given: Any) -> Any:
        runs.append(make_run(*given))
        return runs[-1]

    monkeypatch.setattr(identity, "identity_run", noted)

    def made(**fields: Any) -> list[bytes]:
        return pixels(generate(method, tmp_path, make_trial("easyref", steps=3, **fields)))

    plain, always, late = made(), made(identity=1.0), made(identity=1.0, stages="0-1/0.5-1")
    assert len({*plain, *always, *late}) == 3
    assert made(identity=1.0, stages="0-1/1-1") == plain
    assert [run.passes for run in runs] == [3, 2, 0]
    assert made() == plain


def test_the_control_has_another_groups_identity(
    settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    fields = {"weight": 0.0, "identity": 1.0}
    others = [make_trial("easyref-other", group, **fields) for group in (0, 1)]
    own = make_trial("easyref", 1, **fields)
    methods = load_methods(settings, [*others, own])
    seen = pixels(generate(methods["easyref-other"], tmp_path, others[0]))
    methods["easyref-other"].close()
    swapped = replace(own, prompt=others[0].prompt)
    assert pixels(generate(methods["easyref"], tmp_path, swapped)) == seen
    methods["easyref"].close()
    unet = methods["easyref"]._base.pipe.unet
    assert not unet._forward_pre_hooks
