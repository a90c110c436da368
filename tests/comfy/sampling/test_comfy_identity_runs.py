"""Runs with EasyRef Identity: again, interrupted, inside another, on two threads."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from comfyhost import Pack, euler, golden_unet, guider, latents, predict, sigmas, text
from goldens import difference
from identity_nodes import calls_of, identity

CFG = 5.0
STEPS = 901.0, 601.0, 301.0


@pytest.fixture
def steered(pack: Pack, unet: Any, demo: Any) -> Any:
    return identity(pack, unet, demo.vae, reuse_steps=2)


def sample(model: Any, seed: int = 3, **options: Any) -> torch.Tensor:
    return euler(guider(model, CFG), latents(seed=seed) * 14, sigmas(model, *STEPS), **options)


def test_a_rerun_gives_the_same_bits_whatever_runs_between(steered: Any, unet: Any) -> None:
    first = sample(steered)
    predict(unet, CFG)
    predict(steered, CFG, latents(2, 24, 8))
    assert torch.equal(sample(steered), first)


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupted_sampling_leaves_nothing_behind(steered: Any, unet: Any, step: int) -> None:
    import comfy.model_management as mm

    plain, expected = sample(unet), sample(steered)

    def stop(number: int, *details: Any) -> None:
        if number == step:
            mm.interrupt_current_processing()
        mm.throw_exception_if_processing_interrupted()

    with pytest.raises(mm.InterruptProcessingException):
        sample(steered, callback=stop)
    assert steered.model_options == {"transformer_options": {}}
    assert torch.equal(sample(steered), expected)
    assert torch.equal(sample(unet), plain)


def test_references_act_once_in_a_run_inside_a_run(steered: Any) -> None:
    """ComfyUI adds a model's wrappers to the outer run's options, which have them already."""
    import comfy.samplers

    steps = sigmas(steered, *STEPS)
    noisy = latents() * 14
    result: list[torch.Tensor] = []

    class Nested(comfy.samplers.Sampler):
        def sample(self, outer: Any, _: Any, extra_args: Any, *__: Any, **___: Any) -> Any:
            inner = guider(outer.model_patcher, CFG)
            inner.model_options = extra_args["model_options"]
            result.append(euler(inner, noisy, steps))
            return noisy

    zeros = torch.zeros_like(noisy)
    with calls_of(steered) as calls:
        guider(steered, CFG).sample(zeros, zeros, Nested(), steps, disable_pbar=True)
    assert calls.rows == [1, 2, 2, 1, 2]
    assert torch.equal(result[0], euler(guider(steered, CFG), noisy, steps))


def test_two_threads_give_what_one_after_the_other_gives(
    pack: Pack, demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two UNets, as on two devices, share the VAE."""
    import comfy.model_management as mm

    unets = [golden_unet(pack) for _ in range(2)]

    def run(number: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            model = identity(pack, unets[number], demo.vae, reuse_steps=2, end_percent=0.8)
            start.wait()
            return [sample(model, seed=number * 10 + i) for i in range(2)]

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


def test_a_caller_that_goes_around_the_sampling_gets_the_plain_model_and_a_warning(
    pack: Pack, unet: Any, demo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management as mm

    pack.part("nodes.sampling.identity")._warn_of_sampler.cache_clear()
    model = identity(pack, unet, demo.vae)
    mm.load_models_gpu([unet])

    def call(wrappers: Any) -> torch.Tensor:
        return unet.model.apply_model(
            latents(),
            sigmas(unet, 601.0)[:1],
            c_crossattn=text()[0][0],
            y=torch.zeros(1, 80),
            transformer_options={"wrappers": wrappers},
        )

    with caplog.at_level(logging.WARNING):
        found = call(model.wrappers)
        call(model.wrappers)
    assert difference(found, call({})) == 0
    assert sum("without ComfyUI's own sampling" in message for message in caplog.messages) == 1
