"""What EasyRef Identity costs: passes that serve several steps, memory, and no waiting."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dynamic_vram
import pytest
import torch
from comfyhost import (
    Pack,
    euler,
    gathered,
    golden_unet,
    guider,
    latents,
    predict,
    sigmas,
    stock,
)
from device_waits import waits
from dynamic_vram import Gpu
from goldens import difference
from identity_nodes import calls_of, identity, picture, projections_of

CFG = 5.0
STEPS = 901.0, 701.0, 501.0, 301.0, 101.0


def sample(model: Any, batch: int = 1) -> torch.Tensor:
    steps = sigmas(model, *STEPS)
    return euler(guider(model, CFG), latents(batch) * steps[0], steps)


@pytest.mark.parametrize(
    ("reuse", "rows"),
    [(2, [1, 2, 2, 1, 2, 2, 1, 2]), (3, [1, 2, 2, 2, 1, 2, 2]), (9, [1, 2, 2, 2, 2, 2])],
)
def test_one_pass_serves_as_many_steps(
    pack: Pack, unet: Any, demo: Any, reuse: int, rows: list[int]
) -> None:
    model = identity(pack, unet, demo.vae, reuse_steps=reuse)
    with calls_of(unet) as calls:
        sample(model)
    assert calls.rows == rows
    with calls_of(unet) as calls:  # a second run begins anew
        sample(model)
    assert calls.rows == rows


@pytest.mark.parametrize("sampler", ["heun", "exp_heun_2_x0"])
def test_one_pass_serves_both_ends_of_a_noise_level(
    pack: Pack, unet: Any, demo: Any, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    import comfy.samplers

    if sampler not in comfy.samplers.SAMPLER_NAMES:
        pytest.skip(f"this ComfyUI has no {sampler}")
    model = identity(pack, unet, demo.vae)
    # As of the scheduler karras, whose noise levels the second sampler does not meet to the bit.
    steps = torch.cat((torch.linspace(11.0, 0.3, len(STEPS)) ** 1.3, torch.zeros(1)))

    def run() -> torch.Tensor:
        heun = comfy.samplers.ksampler(sampler)
        x = latents() * steps[0]
        return guider(model, CFG).sample(torch.zeros_like(x), x, heun, steps, disable_pbar=True)

    with calls_of(unet) as calls:
        found = run()
    assert calls.rows.count(1) == len(STEPS)
    monkeypatch.setattr(
        pack.part("nodes.sampling.identity_run").IdentityStep, "is_at", lambda *_: False
    )
    with calls_of(unet) as calls:
        wanted = run()
    assert calls.rows.count(1) == calls.rows.count(2) == 2 * len(STEPS) - 1
    assert difference(found, wanted) < 1e-5 * float(wanted.abs().max())


def test_features_go_with_their_run_without_waiting_for_the_collector(
    pack: Pack, unet: Any, demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kept = pack.part("nodes.sampling.identity_run"), []
    read = module.reference_features

    def noted(*args: Any) -> Any:
        features = read(*args)
        kept.extend(map(weakref.ref, features.values()))
        return features

    monkeypatch.setattr(module, "reference_features", noted)
    gc.collect()
    gc.disable()
    try:
        sample(identity(pack, unet, demo.vae))
        assert kept
        assert not [one for one in kept if one() is not None]
    finally:
        gc.enable()


def test_the_relative_error_of_reused_features_is_shown(
    pack: Pack,
    unet: Any,
    demo: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[tuple[str, str]] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node: shown.append((text, node)))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=instance))
    monkeypatch.setitem(sys.modules, "server", server)
    node = pack.nodes["EasyRefIdentity"]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="12:3"))
    with caplog.at_level(logging.INFO):
        sample(identity(pack, unet, demo.vae))
        assert not shown
        model = identity(pack, unet, demo.vae, reuse_steps=2)
        with projections_of(pack, unet) as layers:
            sample(model)
    # [of step 1, of step 3, of step 5], which are the passes
    read = [
        [
            x
            for x, out in zip(layer.inputs["to_q"], layer.outputs["to_q"], strict=True)
            if len(x) == 1
        ]
        for layer in layers.values()
    ]
    errors = []
    for first in (0, 1):
        off = sum(float((one[first] - one[first + 1]).double().square().sum()) for one in read)
        whole = sum(float(one[first + 1].double().square().sum()) for one in read)
        errors.append((off / whole) ** 0.5)
    text = (
        "3 reference passes for 5 calls of the model; relative error of reused features "
        f"{sum(errors) / 2:.1%}, at most {max(errors):.1%}"
    )
    assert shown == [(text, "12:3")]
    assert f"EasyRef Identity: {text}" in caplog.messages


def test_a_step_never_waits_for_the_device(comfyui: Path, pack: Pack, unet: Any, demo: Any) -> None:
    model = identity(pack, unet, demo.vae, mask=torch.rand(2, 40, 70), reuse_steps=1)
    sample(model, 2)
    with waits(comfyui) as result:
        sample(model, 2)
    in_steps = [place for place in result if "to at" not in place]
    assert in_steps == []


def test_a_weight_that_changes_waits_once_a_step(
    comfyui: Path, pack: Pack, unet: Any, demo: Any
) -> None:
    model = identity(pack, unet, demo.vae, start_percent=0.05, end_percent=0.7)
    sample(model)
    with waits(comfyui) as result:
        sample(model)
    places = {place.split(" at ")[1] for place in result if "to at" not in place}
    assert len(places) == 1
    assert sum("__float__" in place for place in result) == len(STEPS)


def test_comfyui_is_asked_for_the_memory_that_features_take(
    pack: Pack, unet: Any, demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sampler_helpers as helpers

    asked: list[float] = []
    load = helpers.comfy.model_management.load_models_gpu

    def noted(models: Any, memory_required: float = 0, **more: Any) -> Any:
        if unet in models or any(one.model is unet.model for one in models):
            asked.append(more["minimum_memory_required"])
        return load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(helpers.comfy.model_management, "load_models_gpu", noted)
    images = torch.cat([picture(number) for number in range(4)])
    model = identity(pack, unet, demo.vae, images=images)
    predict(unet, CFG, latents())
    with projections_of(pack, unet) as layers:
        predict(model, CFG, latents())
    held = sum(layer.inputs["to_k"][2].nbytes for layer in layers.values())
    assert asked[1] - asked[0] >= held

    def needed(**settings: Any) -> int:
        steered = identity(pack, unet, demo.vae, images=images, **settings)
        (patch,) = steered.get_wrappers("apply_model", "easyref_identity")
        return patch.working_bytes(unet.model, [1, 4, 16, 16])

    once = needed()
    assert held < once < 3 * held
    assert needed(reuse_steps=2) == once + held, "old features are compared with new ones"


def test_memory_is_asked_for_as_many_latents_as_a_context_window_has(
    pack: Pack, unet: Any, demo: Any
) -> None:
    runs = pack.part("nodes.sampling.identity_run")
    node = "comfy_extras.nodes_context_windows.ContextWindowsManualNode"
    model = identity(pack, unet, demo.vae, images=picture(1))
    windows = stock(node, model, 4, 1, "standard_static", 1, False, "flat", 0, False)
    (patch,) = model.get_wrappers("apply_model", "easyref_identity")
    needed = patch.working_bytes(unet.model, [4, 4, 16, 16])
    shapes: list[list[int]] = []

    def prepared(given: Any, shape: list[int], conds: Any, **more: Any) -> None:
        shapes.append([min(4, shape[0]), *shape[1:]])  # as ComfyUI's windows do after it

    run = runs.IdentityRun(patch, ())
    options = runs.with_option(windows.model_options, runs.RUNS, {patch: run})
    runs._prepare_sampling(prepared, windows, [64, 4, 16, 16], {}, options)
    required = unet.model.memory_required
    assert required(shapes[0]) - required([4, 4, 16, 16]) >= needed


def test_references_of_several_passes_are_joined_one_layer_at_a_time(
    pack: Pack, unet: Any, demo: Any
) -> None:
    """Otherwise the features need twice the memory that is asked for."""
    reading = pack.part("nodes.sampling.identity_pass")
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    joined = reading._joined

    def watched(parts: list[torch.Tensor]) -> torch.Tensor:
        kept.extend(weakref.ref(part) for part in parts)
        alive.append(sum(part() is not None for part in kept))
        return joined(parts)

    images = gathered(pack, picture(1), picture(2, 64, 256))
    model = identity(pack, unet, demo.vae, references=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_joined", watched)
        predict(model, CFG)
    assert len(alive) > 2
    assert max(alive) == 2


def test_features_are_given_back_outside_the_window(pack: Pack, unet: Any, demo: Any) -> None:
    runs = pack.part("nodes.sampling.identity_run")
    rested: list[int] = []

    class Watched(runs.IdentityRun):
        def rest(self) -> None:
            super().rest()
            rested.append(len(self._held))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "IdentityRun", Watched)
        sample(identity(pack, unet, demo.vae, end_percent=0.5))
    assert rested
    assert not any(rested)


@pytest.fixture(params=["dynamic", "plain"])
def any_gpu(request: pytest.FixtureRequest) -> Gpu:
    return request.getfixturevalue("gpu" if request.param == "dynamic" else "plain_gpu")


def test_under_managed_memory_nothing_is_on_another_device(
    pack: Pack, any_gpu: Gpu, demo: Any
) -> None:
    """On the stand-in for a GPU any mixed device, and any wait of a step, fails."""
    model = identity(pack, golden_unet(pack), Encoded(demo.vae), mask=torch.rand(1, 16, 16))
    first, later = dynamic_vram.sample(any_gpu, guider(model, CFG), latents(), (10.0, 1.0))
    plain = dynamic_vram.sample(any_gpu, guider(golden_unet(pack), CFG), latents(), (10.0, 1.0))
    assert not later.waits
    assert first.moved >= plain[0].moved


class Encoded:
    """A VAE whose latents are known, as the stand-in for a GPU computes nothing."""

    def __init__(self, vae: Any) -> None:
        self._latents = vae.encode(picture(1))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._latents.clone()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_half_precision_is_near_full(pack: Pack, demo: Any) -> None:
    from goldens import UNET

    load = pack.part("nodes.host.demo_models").load_unet_directory
    full, half = (
        predict(identity(pack, load(UNET, dtype), demo.vae), CFG)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.isfinite().all()
    assert difference(full, half) < 0.3
