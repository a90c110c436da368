"""The stand-in for a GPU itself: what fails on a GPU fails here, and everything is restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfyhost
import dynamic_vram
import pytest
import torch
import torch.nn.functional as F
from comfyhost import Pack
from dynamic_vram import META, DevicesMixed, Gpu, HostWaits


@pytest.mark.parametrize(
    "operation",
    [
        lambda host, there: host + there,
        F.linear,
        lambda host, there: torch.cat((host, there)),
        lambda host, there: there.index_select(0, torch.tensor([0])),
        lambda host, there: F.embedding(torch.tensor([0]), there),
        lambda host, there: F.scaled_dot_product_attention(there[None], host[None], there[None]),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_tensors_of_two_devices_do_not_mix(
    gpu: Gpu, operation: Callable[..., Any], inference: bool
) -> None:
    with torch.inference_mode(inference):
        host, there = torch.ones(3, 3), torch.ones(3, 3, device=META)
        with pytest.raises((DevicesMixed, RuntimeError), match="device"):
            operation(host, there)
        assert (there * torch.tensor(2.0)).is_meta


@pytest.mark.parametrize(
    "question",
    [
        lambda there: there[0, 0].item(),
        lambda there: bool(there.sum() > 0),
        lambda there: there.cpu(),
        lambda there: there.to("cpu", torch.float16),
        lambda there: torch.zeros(3, 3).copy_(there),
        lambda there: there.tolist(),
        lambda there: there.nonzero(),
        lambda there: there[there > 0],
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_the_host_does_not_wait(gpu: Gpu, question: Callable[..., Any], inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises(HostWaits):
        question(torch.ones(3, 3, device=META))


def test_where_waiting_is_allowed_it_is_noted(gpu: Gpu) -> None:
    there = torch.ones(3, 3, device=META)
    with gpu.waiting_allowed(), gpu.watch() as seen:
        assert torch.equal(there.half().cpu(), torch.zeros(3, 3, dtype=torch.half))
        assert torch.isfinite(there).all()
    assert len(seen.waits) == 2
    with pytest.raises(HostWaits):
        there.cpu()


def test_what_is_moved_is_noted_with_its_dtype(gpu: Gpu) -> None:
    half = torch.ones(4, 5, dtype=torch.half)
    with gpu.watch() as seen:
        half.to(META)
        half.to(META, torch.float32)
        torch.empty(4, 5, device=META).copy_(half)
        torch.tensor([1.0, 2.0], device=META)
    assert [one.dtype for one in seen.uploads] == [torch.half, *[torch.float32] * 3]
    assert seen.moved == 40 + 80 + 80 + 8


def test_weights_are_moved_when_used_and_stay_until_memory_is_needed(pack: Pack, gpu: Gpu) -> None:
    import comfy.model_management as mm

    model = comfyhost.golden_unet(pack)
    assert model.is_dynamic()

    def step() -> int:
        with gpu.watch() as seen:
            model.model.diffusion_model.time_embed(torch.zeros(1, 32, device=META))
        return seen.moved

    mm.load_models_gpu([model])
    first = step()
    assert first > 0
    assert step() == 0
    mm.unload_all_models()
    mm.load_models_gpu([model])
    assert step() == first
    gpu.full = True
    mm.unload_all_models()
    mm.load_models_gpu([model])
    assert step() == step() == first


def test_everything_is_restored(pack: Pack) -> None:
    if not dynamic_vram.is_supported():
        pytest.skip(dynamic_vram.TOO_OLD)
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.ops

    patcher = comfy.model_patcher.ModelPatcherDynamic
    loaded = list(mm.current_loaded_models)
    before = {**vars(mm)}, {**vars(patcher)}, comfy.model_patcher.CoreModelPatcher
    with dynamic_vram.dynamic_vram():
        model = comfyhost.golden_unet(pack)
        mm.load_models_gpu([model])
        assert mm.get_torch_device() == META
    assert ({**vars(mm)}, {**vars(patcher)}, comfy.model_patcher.CoreModelPatcher) == before
    assert mm.current_loaded_models == loaded
    assert not comfy.memory_management.aimdo_enabled
    assert torch.ones(1, device=META).is_meta
    assert comfy.ops.manual_cast.Linear(2, 2).weight.shape == (2, 2)
    del model
