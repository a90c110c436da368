"""One run after another: the same numbers again, after an interrupt too, and from two threads."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from comfyhost import (
    GOLDEN_MLLM,
    Pack,
    apply,
    euler,
    golden_unet,
    guider,
    latents,
    predict,
    put_adapter,
    random_text,
    random_tokens,
    sigmas,
    text,
)
from goldens import adapter_tensors, difference

CFG = 5.0
STEPS = (901.0, 601.0, 301.0)


@pytest.fixture
def steered(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> Any:
    """A model with everything on: mask, window, LoRA."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 20:] = 1
    return apply(pack, unet, easyref, tokens, mask=mask, start_percent=0.02, end_percent=0.8)


def sample(model: Any, seed: int = 3, **options: Any) -> torch.Tensor:
    steps = sigmas(model, *STEPS)
    return euler(guider(model, CFG), latents(2, seed=seed) * 14, steps, **options)


def test_a_rerun_gives_the_same_bits(steered: Any) -> None:
    first = sample(steered)
    assert torch.equal(sample(steered), first)
    assert not torch.equal(sample(steered, seed=4), first)
    assert torch.equal(sample(steered), first)


@pytest.mark.parametrize("kind", ["ComfyUI's", "MemoryError"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_run_that_lacks_memory_is_tried_once_more_with_all_of_it_free(
    steered: Any, monkeypatch: pytest.MonkeyPatch, step: int, kind: str
) -> None:
    import comfy.model_management as mm

    first = sample(steered)
    noise = mm.OOM_EXCEPTION("CUDA out of memory") if kind == "ComfyUI's" else MemoryError()
    calls, unloaded = [], []
    unload = mm.unload_all_models
    monkeypatch.setattr(mm, "unload_all_models", lambda: unloaded.append(unload()))

    def run_out(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == step + 1:
            raise noise
        return executor(*args, **kwargs)

    model = steered.clone()
    model.add_wrapper_with_key("apply_model", "other", run_out)
    assert torch.equal(sample(model), first)
    assert len(unloaded) == 1
    assert len(calls) == step + 1 + len(STEPS)


def test_a_run_that_lacks_memory_twice_is_refused_in_words(steered: Any) -> None:
    def run_out(executor: Any, *args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    model = steered.clone()
    model.add_wrapper_with_key("apply_model", "other", run_out)
    with pytest.raises(ValueError, match=r"Not enough memory to sample with references .*smaller"):
        sample(model)
    assert torch.equal(sample(steered), sample(steered))


def test_a_run_with_other_texts_and_sizes_between_changes_nothing(steered: Any, unet: Any) -> None:
    first = sample(steered)
    predict(steered, CFG, latents(1, 24, 16), positive=random_text(1))
    predict(unet, CFG)
    assert torch.equal(sample(steered), first)


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupted_sampling_leaves_nothing_behind(steered: Any, unet: Any, step: int) -> None:
    import comfy.model_management as mm

    plain, expected = sample(unet), sample(steered)

    def stop(number: int, *details: Any) -> None:
        """As the node's progress bar does when the user has pressed the button."""
        if number == step:
            mm.interrupt_current_processing()
        mm.throw_exception_if_processing_interrupted()

    with pytest.raises(mm.InterruptProcessingException):
        sample(steered, callback=stop)
    assert steered.model_options == {"transformer_options": {}}
    assert torch.equal(sample(steered), expected)
    assert torch.equal(sample(unet), plain)


def test_an_error_inside_an_attention_layer_leaves_nothing_behind(steered: Any, unet: Any) -> None:
    plain, expected = sample(unet), sample(steered)
    broken = steered.clone()

    def fail(*args: Any) -> Any:
        raise RuntimeError("another pack's mistake")

    broken.set_model_attn2_replace(fail, "middle", 0, 1)
    with pytest.raises(RuntimeError, match="another pack's mistake"):
        sample(broken)
    assert torch.equal(sample(steered), expected)
    assert torch.equal(sample(unet), plain)


def test_two_threads_give_what_one_after_the_other_gives(
    pack: Pack, fresh_easyref: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two UNets, as on two devices, share the adapter, the tokens and the mask."""
    import comfy.model_management as mm

    groups = [random_tokens(pack, fresh_easyref, seed) for seed in (1, 2)]
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:] = 1
    unets = [golden_unet(pack) for _ in range(2)]
    settings = {"mask": mask, "end_percent": 0.8}

    def steer(number: int) -> Any:
        model = apply(pack, unets[number], fresh_easyref, groups[0], **settings)
        return apply(pack, model, fresh_easyref, groups[1], weight=0.5, lora_strength=0.3)

    def run(number: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            model = steer(number)
            start.wait()
            return [sample(model, seed=number * 10 + i) for i in range(3)]

    # ComfyUI's own list of loaded models is not thread-safe.
    lock, load = threading.Lock(), mm.load_models_gpu

    def load_alone(*args: Any, **kwargs: Any) -> None:
        with lock:
            load(*args, **kwargs)

    monkeypatch.setattr(mm, "load_models_gpu", load_alone)
    start = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, range(2)))
    start = threading.Barrier(1)
    for number in range(2):
        for result, expected in zip(together[number], run(number), strict=True):
            assert torch.equal(result, expected)


def test_keys_and_values_requested_by_many_threads_are_computed_once(
    pack: Pack, fresh_easyref: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pack.part("nodes.host.key_value_cache")
    computed = []
    project = store.project_tokens
    monkeypatch.setattr(
        store, "project_tokens", lambda *args: computed.append(args) or project(*args)
    )
    barrier = threading.Barrier(8)

    def ask(number: int) -> Any:
        barrier.wait()
        return fresh_easyref.key_values.get(tokens, torch.device("cpu"), torch.float32)

    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(ask, range(8)))
    assert len(computed) == 1
    assert all(f is result[0] for f in result)


def test_a_model_in_training_can_use_the_keys_that_a_run_computed(pack: Pack, easyref: Any) -> None:
    """Tensors of inference mode cannot be saved for a backward pass."""
    with torch.inference_mode(False):
        unet = golden_unet(pack)
    model = apply(pack, unet, easyref, random_tokens(pack, easyref, seed=1), lora_strength=0.0)
    predict(model, CFG)
    with torch.inference_mode(False), torch.enable_grad():
        x = latents(1).requires_grad_()
        denoised = model.model.apply_model(
            x,
            sigmas(model, 601.0)[:1].clone(),
            c_crossattn=text()[0][0],
            y=torch.zeros(1, 80),
            transformer_options={"wrappers": model.wrappers},
        )
        denoised.square().mean().backward()
    assert x.grad.isfinite().all()
    assert float(x.grad.abs().max()) > 0


def test_keys_and_values_are_freed_with_their_tokens(
    pack: Pack, unet: Any, fresh_easyref: Any
) -> None:
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, unet, fresh_easyref, tokens)
    predict(model, CFG)
    computed = fresh_easyref.key_values.get(tokens, torch.device("cpu"), torch.float32)
    gone = weakref.ref(computed)
    del computed, model, tokens
    gc.collect()
    assert gone() is None


def test_a_file_that_changes_during_a_run_is_reported(pack: Pack, unet: Any, tokens: Any) -> None:
    name = put_adapter(pack, "changing.safetensors", adapter_tensors())
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    model = apply(pack, unet, easyref, tokens)
    path = easyref.checkpoint.path
    os.utime(path, (1, 1))
    with pack.refused(name, "has changed"):
        predict(model, CFG)
    assert difference(predict(unet), predict(golden_unet(pack))) == 0


def test_a_copy_of_a_runs_options_copies_no_keys_and_values(steered: Any) -> None:
    """Some nodes copy them whole at every step."""
    expected = predict(steered, CFG)
    copies: list[Any] = []

    def copying(args: dict[str, Any]) -> torch.Tensor:
        given = args["model_options"]["transformer_options"]
        copies.append((given, copy.deepcopy(given)))
        return args["denoised"]

    copied = steered.clone()
    copied.set_model_sampler_post_cfg_function(copying)
    assert torch.equal(predict(copied, CFG), expected)
    ((given, own),) = copies
    assert given["easyref_run"].key_values
    assert own["easyref_run"] is given["easyref_run"]


def test_references_act_once_in_a_run_inside_a_run(steered: Any) -> None:
    """ComfyUI adds a model's wrappers to the outer run's options, which have them already."""
    import comfy.samplers

    steps = sigmas(steered, *STEPS)
    noisy = latents(2) * 14
    result: list[torch.Tensor] = []

    class Nested(comfy.samplers.Sampler):
        def sample(self, outer: Any, _: Any, extra_args: Any, *__: Any, **___: Any) -> Any:
            inner = guider(outer.model_patcher, CFG)
            inner.model_options = extra_args["model_options"]
            result.append(euler(inner, noisy, steps))
            return noisy

    zeros = torch.zeros_like(noisy)
    guider(steered, CFG).sample(zeros, zeros, Nested(), steps, disable_pbar=True)
    expected = euler(guider(steered, CFG), noisy, steps)
    assert torch.equal(result[0], expected)
