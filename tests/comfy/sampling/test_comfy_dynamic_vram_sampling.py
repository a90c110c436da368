"""Sampling with references under dynamic VRAM, on a stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfyhost
import dynamic_vram
import pytest
import torch
from comfyhost import GOLDEN_MLLM, Pack, apply, put_adapter, random_tokens
from dynamic_vram import Gpu
from goldens import adapter_tensors

BATCH = 2


@pytest.fixture
def half_easyref(pack: Pack) -> Any:
    """The golden adapter in half precision."""
    name = put_adapter(
        pack, "half_for_sampling.safetensors", {n: t.half() for n, t in adapter_tensors().items()}
    )
    return pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")


def sample(gpu: Gpu, model: Any, positive: Any = None) -> list[dynamic_vram.Record]:
    """What the first model call of a run moves and waits for, and what the second does."""
    guider = comfyhost.guider(model, 7.5, positive=positive)
    return dynamic_vram.sample(gpu, guider, comfyhost.latents(BATCH), (10.0, 1.0))


def curve(pack: Pack) -> Any:
    inputs = pack.nodes["EasyRefWeightCurve"].GET_SCHEMA().inputs
    settings = {"shape": "linear", "end_value": 0.2}
    return pack.run("EasyRefWeightCurve", **({i.id: i.default for i in inputs} | settings))


def region(pack: Pack, easyref: Any, mask: torch.Tensor, previous: Any = None) -> Any:
    tokens = random_tokens(pack, easyref, seed=5)
    return pack.run("EasyRefRegion", tokens, mask, 0.7, previous=previous)


def half_mask(batch: int = 1) -> torch.Tensor:
    mask = torch.ones(batch, 32, 32)
    mask[:, :, :16] = 0
    return mask


SETTINGS: dict[str, Callable[[Pack, Any], dict[str, Any]]] = {
    "weight": lambda pack, easyref: {"weight": 0.6},
    "window": lambda pack, easyref: {"start_percent": 0.1, "end_percent": 0.8},
    "mask": lambda pack, easyref: {"mask": half_mask()},
    "grey mask": lambda pack, easyref: {"mask": half_mask() + 0.5},
    "masks of a batch": lambda pack, easyref: {"mask": half_mask(BATCH)},
    "curve": lambda pack, easyref: {"curve": curve(pack)},
    "regions": lambda pack, easyref: {
        "tokens": None,
        "regions": region(pack, easyref, half_mask(), region(pack, easyref, 1 - half_mask())),
        "normalise": True,
    },
    "groups of a batch": lambda pack, easyref: {
        "tokens": random_tokens(pack, easyref, seed=6, batch=BATCH)
    },
}


@pytest.fixture(scope="module")
def plain(pack: Pack) -> list[dynamic_vram.Record]:
    """What ComfyUI itself does in each model call of the same run: it moves the texts again."""
    if not dynamic_vram.is_supported():
        pytest.skip(dynamic_vram.TOO_OLD)
    with torch.inference_mode(), dynamic_vram.dynamic_vram() as gpu:
        return sample(gpu, comfyhost.golden_unet(pack))


@pytest.mark.parametrize("kind", SETTINGS)
def test_after_the_first_call_nothing_is_moved_or_waited_for(
    pack: Pack, gpu: Gpu, half_easyref: Any, plain: list[dynamic_vram.Record], kind: str
) -> None:
    tokens = random_tokens(pack, half_easyref, seed=1)
    settings = {"tokens": tokens} | SETTINGS[kind](pack, half_easyref)
    model = apply(pack, comfyhost.golden_unet(pack), half_easyref, **settings)
    first, later = sample(gpu, model)
    assert first.moved > plain[0].moved > later.moved
    assert len(first.waits) < 20, "a value of the noise schedule each"
    assert later == plain[1]


def test_two_applies_and_a_conditioning_with_its_own_references(
    pack: Pack, gpu: Gpu, half_easyref: Any, plain: list[dynamic_vram.Record]
) -> None:
    one, other, third = (random_tokens(pack, half_easyref, seed) for seed in (1, 2, 3))
    model = apply(pack, comfyhost.golden_unet(pack), half_easyref, one, mask=half_mask())
    model = apply(pack, model, half_easyref, other, start_percent=0.2, curve=curve(pack))
    carrying = pack.run("EasyRefSetConditioning", comfyhost.text(), third, 0.5)
    assert sample(gpu, model, carrying)[1] == plain[1]
    assert sample(gpu, model)[1] == plain[1]


def test_projections_are_moved_in_the_files_dtype(pack: Pack, gpu: Gpu, half_easyref: Any) -> None:
    """torch would widen them on the CPU and move twice the bytes."""
    tokens = random_tokens(pack, half_easyref, seed=1)
    with gpu.waiting_allowed(), gpu.watch() as seen:
        half_easyref.key_values.get(tokens, gpu.device, torch.float16)
    own, *weights = seen.uploads
    assert own.shape == (2, *tokens.cond.shape[1:])
    assert {one.dtype for one in weights} == {torch.float16}
    assert len(weights) == 2 * len(half_easyref.checkpoint.cross_attention)


def test_the_lora_is_merged_as_weights_are_moved_and_only_once(
    pack: Pack, gpu: Gpu, half_easyref: Any, plain: list[dynamic_vram.Record]
) -> None:
    """A changed weight of the references merges and moves nothing again."""
    unet = comfyhost.golden_unet(pack)
    tokens = random_tokens(pack, half_easyref, seed=1)
    sample(gpu, apply(pack, unet, half_easyref, tokens))
    modules = dict(unet.model.named_modules())
    merging = {
        f"{name}.weight"
        for name, module in modules.items()
        if getattr(module, "weight_lowvram_function", None) is not None
    }
    assert merging == set(apply(pack, unet, half_easyref, tokens).patches)

    first, _ = sample(gpu, apply(pack, unet, half_easyref, tokens, weight=0.5))
    assert first.uploads == plain[1].uploads
    assert not first.file_reads

    stronger, _ = sample(gpu, apply(pack, unet, half_easyref, tokens, lora_strength=1.5))
    assert stronger.moved > first.moved
    without, _ = sample(gpu, apply(pack, unet, half_easyref, tokens, lora_strength=0))
    assert all(
        getattr(module, "weight_lowvram_function", None) is None for module in modules.values()
    )
    assert without.moved > first.moved
