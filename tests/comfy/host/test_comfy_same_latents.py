"""The shipped demo models give the same latents in ComfyUI and in diffusers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, stock
from goldens import difference

from easyref_core.adapter.stages import Window
from easyref_core.demo_set import TRAINED_SET
from easyref_core.pictures.preprocessing import picture_levels
from workshop.demo.adapter import AppliedIdentity, AppliedReferences, DemoAdapter
from workshop.demo.models import DemoModels
from workshop.demo.references import read_rows
from workshop.demo.rows import Row, SamplingSettings

SETTINGS = SamplingSettings(steps=5)
ALIKE = 1e-3


@dataclass(frozen=True)
class Case:
    """What acts in addition to the prompt."""

    easyref: bool
    outline: bool
    aggregation: str = "easyref"
    identity: bool = False


CASES = {
    "prompt only": Case(False, False),
    "EasyRef": Case(True, False),
    "averaged": Case(True, False, "average"),
    "ControlNet": Case(False, True),
    "both": Case(True, True),
    "identity": Case(True, False, identity=True),
}


@pytest.fixture(scope="module")
def row() -> Row:
    return read_rows()[0]


@pytest.fixture(scope="module")
def models() -> DemoModels:
    return DemoModels(TRAINED_SET, half=False)


@pytest.fixture(scope="module")
def adapter(models: DemoModels) -> DemoAdapter:
    return models.adapter()


@pytest.fixture(scope="module")
def host(pack: Pack) -> Any:
    """The outputs of EasyRef Demo Models."""
    return pack.nodes["EasyRefDemoModels"].execute().result


def in_diffusers(models: DemoModels, adapter: DemoAdapter, row: Row, case: Case) -> torch.Tensor:
    references, outlines = None, None
    if case.easyref:
        average = case.aggregation == "average"
        references = AppliedReferences(
            adapter, adapter.encode([row.references], [row.prompt], average)
        )
    if case.identity:
        latents = models.identity_latents([row.references], SETTINGS.side)
        window = Window(start=SETTINGS.identity_start, weight=SETTINGS.identity_weight)
        references = replace(references, identity=AppliedIdentity(latents, window))
    if case.outline:
        outlines = picture_levels(row.outline)[None]
    return models.sample_latents([row.prompt], [SETTINGS.seed], SETTINGS, references, outlines)


def in_comfyui(pack: Pack, host: Any, row: Row, case: Case) -> torch.Tensor:
    from nodes import ControlNetApplyAdvanced

    model, clip, vae, easyref, control_net = host[:5]
    positive, negative = (
        stock("nodes.CLIPTextEncode", clip, text) for text in (row.prompt, SETTINGS.negative)
    )
    if case.easyref:
        group = tuple(map(pack.part("easyref_core.encode.group").Reference, row.references))
        tokens = pack.run(
            "EasyRefEncode", easyref, row.prompt, case.aggregation, 0, references=group
        )
        model = apply(pack, model, easyref, tokens)
    if case.identity:
        model = pack.run(
            "EasyRefIdentity",
            model,
            vae,
            references=group,
            weight=SETTINGS.identity_weight,
            start_percent=SETTINGS.identity_start,
            end_percent=1.0,
            reuse_steps=1,
            easyref=easyref if easyref.checkpoint.identity_lora else None,
        )
    if case.outline:
        hint = picture_levels(row.outline).movedim(0, -1)[None].float() / 255
        node = ControlNetApplyAdvanced()
        positive, negative = node.apply_controlnet(
            positive, negative, control_net, hint, SETTINGS.control_strength, 0.0, 1.0, vae
        )
    side = SETTINGS.side // 8
    sampled = stock(
        "nodes.KSampler",
        model,
        SETTINGS.seed,
        SETTINGS.steps,
        SETTINGS.cfg,
        "ddim",
        "ddim_uniform",
        positive,
        negative,
        {"samples": torch.zeros(1, 4, side, side)},
    )
    # Between its nodes ComfyUI keeps latents divided by SDXL's scale.
    return model.get_model_object("latent_format").process_in(sampled["samples"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_shipped_weights_give_the_same_latents(
    pack: Pack, host: Any, models: DemoModels, adapter: DemoAdapter, row: Row, case: Case
) -> None:
    found = in_comfyui(pack, host, row, case)
    expected = in_diffusers(models, adapter, row, case)
    assert difference(found, expected) < ALIKE
    if case != CASES["prompt only"]:
        plain = in_diffusers(models, adapter, row, CASES["prompt only"])
        assert difference(expected, plain) > 0.1
