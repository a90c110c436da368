"""Keys and values of reference tokens: a budget, and ComfyUI may unload them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import comfyhost
import dynamic_vram
import pytest
import torch
from comfyhost import (
    GOLDEN_MLLM,
    Pack,
    apply,
    euler,
    guider,
    latents,
    predict,
    put_adapter,
    random_tokens,
    sigmas,
    stock,
    text,
)
from dynamic_vram import META, Gpu
from goldens import adapter_tensors
from region_nodes import regions

CPU = torch.device("cpu")
CFG = 7.5
SIGMAS = (10.0, 4.0, 1.0)


@pytest.fixture
def store_module(pack: Pack) -> ModuleType:
    return pack.part("nodes.host.key_value_cache")


@pytest.fixture
def projected(store_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tokens of every projection."""
    project, computed = store_module.project_tokens, []

    def noted(checkpoint: Any, tokens: Any, *args: Any) -> Any:
        computed.append(tokens)
        return project(checkpoint, tokens, *args)

    monkeypatch.setattr(store_module, "project_tokens", noted)
    return computed


@pytest.fixture
def limited(pack: Pack, store_module: ModuleType, fresh_easyref: Any) -> Callable[[float], Any]:
    """The golden adapter with a budget of so many sets."""

    def of(sets: float) -> Any:
        checkpoint = fresh_easyref.checkpoint
        tokens = random_tokens(pack, fresh_easyref, seed=0)
        each = store_module.KeyValueStore(checkpoint).get(tokens, CPU, torch.float32).nbytes
        store = store_module.KeyValueStore(checkpoint, int(sets * each))
        return replace(fresh_easyref, key_values=store)

    return of


def loaded_sets() -> list[Any]:
    """The patchers of sets that ComfyUI has loaded."""
    import comfy.model_management as mm

    models = [loaded.model for loaded in mm.current_loaded_models if loaded.model is not None]
    return [model for model in models if type(model.model).__name__ == "EasyRefKeyValues"]


def test_the_latest_sets_are_cached_within_the_budget(
    pack: Pack, limited: Callable[[float], Any], projected: list[Any]
) -> None:
    easyref = limited(2.5)
    groups = [random_tokens(pack, easyref, seed) for seed in range(4)]
    result = [weakref.ref(easyref.key_values.get(g, CPU, torch.float32)) for g in groups]
    assert [one() is not None for one in result] == [False, False, True, True]
    easyref.key_values.get(groups[2], CPU, torch.float32)
    easyref.key_values.get(groups[0], CPU, torch.float32)
    assert [one() is not None for one in result] == [False, False, True, False]
    assert projected[1:] == [*groups, groups[0]]


def test_the_latest_set_is_cached_however_large(
    pack: Pack, limited: Callable[[float], Any], projected: list[Any]
) -> None:
    easyref = limited(0.5)
    groups = [random_tokens(pack, easyref, seed) for seed in (1, 2)]
    for tokens in (groups[0], groups[0], groups[1], groups[1]):
        easyref.key_values.get(tokens, CPU, torch.float32)
    assert projected[1:] == groups


@pytest.mark.parametrize("kind", ["regions", "apply nodes", "conditionings"])
def test_what_a_run_uses_at_once_stays_whatever_the_budget(
    pack: Pack,
    unet: Any,
    fresh_easyref: Any,
    limited: Callable[[float], Any],
    projected: list[Any],
    kind: str,
) -> None:
    easyref = limited(1)
    groups = [random_tokens(pack, easyref, seed) for seed in (1, 2, 3)]

    def results(easyref: Any) -> torch.Tensor:
        texts: dict[str, Any] = {}
        model = unet
        if kind == "regions":
            parts = [(tokens, torch.ones(1, 8, 8), {}) for tokens in groups]
            model = apply(pack, unet, easyref, None, regions=regions(pack, *parts))
        elif kind == "apply nodes":
            for tokens in groups:
                model = apply(pack, model, easyref, tokens)
        else:
            given = [
                pack.run("EasyRefSetConditioning", text(), tokens, 1.0) for tokens in groups[:2]
            ]
            texts["positive"] = stock("nodes.ConditioningCombine", *given)
            texts["negative"] = pack.run("EasyRefSetConditioning", text("negative"), groups[2], 1.0)
            model = apply(pack, unet, easyref, None)
        steps = sigmas(model, 901.0, 601.0, 301.0)
        return euler(guider(model, CFG, **texts), latents() * 14, steps)

    expected = results(fresh_easyref)
    projected.clear()
    assert torch.equal(results(easyref), expected)
    assert sorted(map(id, projected)) == sorted(map(id, groups))
    gc.collect()
    kept = [s for g in groups for s in easyref.key_values._cached.get(g, {}).values()]
    assert len(kept) == 1


def test_comfyui_counts_the_sets_of_a_run_beside_the_model(
    pack: Pack, unet: Any, fresh_easyref: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    load, loads = mm.load_models_gpu, []

    def noted(models: Any, *args: Any, **kwargs: Any) -> Any:
        loads.append(list(models))
        return load(models, *args, **kwargs)

    monkeypatch.setattr(mm, "load_models_gpu", noted)
    groups = [random_tokens(pack, fresh_easyref, seed) for seed in (1, 2)]
    model = apply(pack, apply(pack, unet, fresh_easyref, groups[0]), fresh_easyref, groups[1])
    predict(model, CFG)
    ((first, *sets),) = loads
    assert first.model is unet.model
    held = [fresh_easyref.key_values.get(g, CPU, torch.float32) for g in groups]
    assert {id(s) for s in sets} == {id(one.patcher) for one in held}
    for one in held:
        shapes = [t.nbytes for pair in one.layers.values() for t in pair]
        assert one.patcher.model_size() == one.nbytes == sum(shapes) > 0
    predict(apply(pack, unet, fresh_easyref, groups[0], weight=0.0), CFG)
    assert loads[1][1:] == [], "nothing acts, so nothing is to be loaded"


def test_a_set_without_tokens_leaves_comfyuis_list(
    pack: Pack, unet: Any, fresh_easyref: Any
) -> None:
    before = len(loaded_sets())
    tokens = random_tokens(pack, fresh_easyref, seed=7)
    model = apply(pack, unet, fresh_easyref, tokens)
    predict(model, CFG)
    assert len(loaded_sets()) == before + 1
    del tokens, model
    gc.collect()
    assert len(loaded_sets()) == before


def test_every_gpu_of_a_run_has_its_sets_before_the_first_step(
    pack: Pack,
    unet: Any,
    fresh_easyref: Any,
    store_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project, sampling_run = store_module.project_tokens, pack.part("nodes.sampling.run")
    monkeypatch.setattr(  # the other device has no data to check
        store_module, "project_tokens", lambda *args: project(*args[:2], CPU, args[3])
    )
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, unet, fresh_easyref, tokens)
    other = SimpleNamespace(load_device=META)
    model.get_additional_models_with_key = lambda key: [other] if key == "multigpu" else []
    options = {"transformer_options": {"wrappers": model.wrappers}}
    run = SimpleNamespace(model_patcher=model, conds={"positive": [{}]}, model_options=options)
    held = sampling_run.key_values_of_run(run)
    assert [one.patcher.load_device for one in held] == [CPU, META]


def test_other_models_of_a_conditioning_are_loaded_too_and_nothing_stays_on_it(
    pack: Pack, unet: Any, fresh_easyref: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run breaks off: a guider may be a node's output, kept beyond it."""
    import comfy.model_management as mm

    others = [comfyhost.golden_unet(pack) for _ in range(2)]
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, unet, fresh_easyref, tokens)
    load, loads = mm.load_models_gpu, []
    monkeypatch.setattr(
        mm, "load_models_gpu", lambda models, **_: loads.append(list(models)) or load(models)
    )
    broken = guider(model, CFG, positive=text(additional_models=others))
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        comfyhost.predict_with(broken)
    ((_, *loaded),) = loads
    assert len(loaded) == 3
    assert loaded[:2] == others
    entries = [entry for entries in broken.conds.values() for entry in entries]
    assert [entry.get("additional_models") for entry in entries] == [others, None]


@pytest.mark.parametrize("kind", ["ComfyUI's", "aimdo's"])
def test_without_memory_on_the_gpu_they_are_computed_on_the_cpu(
    pack: Pack,
    fresh_easyref: Any,
    store_module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    import comfy.model_management as mm

    project, full = store_module.project_tokens, {CPU: False}
    error = {"ComfyUI's": mm.OOM_EXCEPTION("CUDA out of memory"), "aimdo's": MemoryError("VBAR")}

    def no_room(checkpoint: Any, tokens: Any, device: Any, dtype: Any) -> Any:
        if full.get(device, True):
            raise error[kind]
        return project(checkpoint, tokens, device, dtype)

    monkeypatch.setattr(store_module, "project_tokens", no_room)
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    expected = fresh_easyref.key_values.get(tokens, CPU, torch.float32)
    held = fresh_easyref.key_values.get(tokens, META, torch.float32)
    assert "computed on the CPU" in caplog.text
    for layer, pair in zip(held.patcher.model.layers, expected.layers.values(), strict=True):
        assert torch.equal(layer.key, pair[0])
        assert torch.equal(layer.value, pair[1])
    full[CPU] = True
    with pack.refused("Not enough memory for the keys and values", "MB"):
        fresh_easyref.key_values.get(tokens, META, torch.bfloat16)


def test_a_device_has_one_set_however_it_is_called(
    pack: Pack, fresh_easyref: Any, projected: list[Any]
) -> None:
    """A Mac's GPU is `mps` to ComfyUI and `mps:0` to tensors; the CPU is both here."""
    tokens, store = random_tokens(pack, fresh_easyref, seed=0), fresh_easyref.key_values
    for_comfyui = store.get(tokens, torch.device("cpu", 0), torch.float32)
    for_the_model = store.get(tokens, torch.device("cpu"), torch.float32)
    assert for_comfyui is for_the_model
    assert projected == [tokens]


def test_another_error_of_the_projection_is_not_reported_as_out_of_memory(
    pack: Pack, fresh_easyref: Any, store_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(store_module, "project_tokens", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        fresh_easyref.key_values.get(random_tokens(pack, fresh_easyref, 1), CPU, torch.float32)


@pytest.fixture
def steered(pack: Pack, gpu: Gpu) -> tuple[Any, Any, Any]:
    """(model, adapter in half precision, tokens) on the stand-in for a GPU."""
    half = {n: t.half() for n, t in adapter_tensors().items()}
    name = put_adapter(pack, "half_for_keys.safetensors", half)
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    tokens = random_tokens(pack, easyref, seed=1)
    model = apply(pack, comfyhost.golden_unet(pack), easyref, tokens, lora_strength=0.0)
    return model, easyref, tokens


def sample(gpu: Gpu, model: Any) -> list[Any]:
    return dynamic_vram.sample(gpu, guider(model, CFG), latents(), SIGMAS)


def test_sets_are_on_the_gpu_while_a_run_lasts_and_leave_when_comfyui_unloads(
    gpu: Gpu, steered: tuple[Any, Any, Any], projected: list[Any]
) -> None:
    import comfy.model_management as mm

    model, easyref, tokens = steered
    sample(gpu, model)
    (held,) = easyref.key_values._cached[tokens].values()
    layers = held.patcher.model.layers
    assert held.patcher in loaded_sets()
    assert all(layer.key.is_meta and layer.value.is_meta for layer in layers)
    assert held.patcher.loaded_size() >= held.nbytes
    mm.unload_all_models()
    assert not any(layer.key.is_meta or layer.value.is_meta for layer in layers)
    assert held.patcher.loaded_size() == 0
    assert loaded_sets() == []
    _, *later = sample(gpu, model)
    assert projected == [tokens]
    assert all(layer.key.is_meta for layer in layers)
    assert later[0] == later[1]


def on_gpu(held: Any) -> bool:
    layers = held.patcher.model.layers
    result = {tensor.is_meta for layer in layers for tensor in (layer.key, layer.value)}
    assert len(result) == 1
    return result.pop()


def test_the_latest_sets_stay_on_the_gpu_and_older_ones_are_on_the_cpu(
    pack: Pack, gpu: Gpu, steered: tuple[Any, Any, Any], projected: list[Any]
) -> None:
    model, easyref, tokens = steered
    other = random_tokens(pack, easyref, seed=2)
    plain = comfyhost.golden_unet(pack)
    sample(gpu, model)
    (first,) = easyref.key_values._cached[tokens].values()
    assert on_gpu(first)
    sample(gpu, apply(pack, plain, easyref, other, lora_strength=0.0))
    (second,) = easyref.key_values._cached[other].values()
    assert on_gpu(second)
    assert not on_gpu(first)
    assert first.patcher.loaded_size() == 0
    sample(gpu, model)
    assert on_gpu(first)
    assert projected == [tokens, other]


def test_a_set_that_another_run_uses_stays_on_the_gpu(
    pack: Pack, gpu: Gpu, steered: tuple[Any, Any, Any], store_module: ModuleType
) -> None:
    model, easyref, tokens = steered
    sample(gpu, model)
    (held,) = easyref.key_values._cached[tokens].values()
    with store_module.in_use([held]):
        easyref.key_values.leave_devices()
        assert on_gpu(held)
    easyref.key_values.leave_devices()
    assert not on_gpu(held)


def test_later_steps_move_nothing_for_references(
    pack: Pack, gpu: Gpu, steered: tuple[Any, Any, Any]
) -> None:
    plain = sample(gpu, comfyhost.golden_unet(pack))
    result = sample(gpu, steered[0])
    assert [one.moved for one in result[1:]] == [one.moved for one in plain[1:]]


def test_the_same_holds_without_dynamic_vram(
    pack: Pack, gpu: Gpu, projected: list[Any], fresh_easyref: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on older cores and with `--disable-dynamic-vram`: whole models are moved."""
    import comfy.model_management as mm
    import comfy.model_patcher

    plain = comfy.model_patcher.ModelPatcher
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", plain)
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, comfyhost.golden_unet(pack), fresh_easyref, tokens, lora_strength=0.0)
    assert type(model) is plain
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        _, *later = sample(gpu, model)
        (held,) = fresh_easyref.key_values._cached[tokens].values()
        assert type(held.patcher) is plain
        assert on_gpu(held)
        assert held.patcher.loaded_size() == held.nbytes
        assert later[0] == later[1]
        with gpu.waiting_allowed():
            mm.unload_all_models()
        assert not on_gpu(held)
        assert loaded_sets() == []
        sample(gpu, model)
        assert on_gpu(held)
        with gpu.waiting_allowed():
            fresh_easyref.key_values.leave_devices()
            assert not on_gpu(held)
            mm.unload_all_models()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert projected == [tokens]


def test_sets_without_memory_on_the_gpu_are_copied_when_used(
    gpu: Gpu, steered: tuple[Any, Any, Any]
) -> None:
    _, easyref, tokens = steered
    with gpu.waiting_allowed():
        held = easyref.key_values.get(tokens, META, torch.float16)
    for key, value in held.layers.values():
        assert key.is_meta
        assert value.is_meta


def test_projections_are_moved_in_the_files_dtype(
    pack: Pack, gpu: Gpu, steered: tuple[Any, Any, Any]
) -> None:
    _, easyref, tokens = steered
    checkpoint = easyref.checkpoint
    with gpu.waiting_allowed(), gpu.watch() as seen:
        pack.part("easyref_core.adapter.key_values").project_tokens(
            checkpoint, tokens, META, torch.bfloat16
        )
    sizes = sum(
        2 * torch.Size(checkpoint.file.tensors[parts[p]].shape).numel()
        for parts in checkpoint.cross_attention.values()
        for p in ("to_k_ip", "to_v_ip")
    )
    given = tokens.cond.nbytes + tokens.uncond.nbytes
    assert seen.moved == sizes + given
