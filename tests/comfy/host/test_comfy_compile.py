"""Compiled models: whatever was sampled before, every result equals the uncompiled one.

Backend "eager" traces as every backend does and compiles nothing; the node's own guard filter is
what makes traces keep values.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, golden_unet, predict, random_tokens, text

Variant = Callable[[Any], Any]
VARIANTS = (
    "plain",
    "steered",
    "other tokens",
    "other weight",
    "weight 0",
    "outside its window",
    "left",
    "right",
    "curve",
    "layer weights",
    "two",
    "regions",
    "a prompt's own",
)


@pytest.fixture(autouse=True)
def _fresh_traces() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compile_model(model: Any, keys: tuple[str, ...] = ("diffusion_model",)) -> Any:
    """What the node does, with a backend that is there on every computer."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    compiled = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(compiled, "eager", options=options, keys=list(keys))
    return compiled


def traces() -> int:
    return torch._dynamo.utils.counters["frames"]["ok"]


@pytest.fixture
def variants(pack: Pack, easyref: Any, tokens: Any) -> dict[str, Variant]:
    """Models that differ in one thing each, for any trace to mix up."""

    def steered(chosen: Any = tokens, **settings: Any) -> Variant:
        return lambda model: apply(pack, model, easyref, chosen, **settings)

    left, right = torch.zeros(2, 1, 16, 16)
    left[..., :8] = right[..., 4:12] = 1
    others = random_tokens(pack, easyref, 7)
    curve = pack.run("EasyRefWeightCurve", "linear", 1.0, 0.2, "")
    layers = pack.run("EasyRefLayerWeights", "all", middle=0.2)
    regions = pack.run("EasyRefRegion", others, left, 1.0)
    return {
        "plain": lambda model: model,
        "steered": steered(),
        "other tokens": steered(others),
        "other weight": steered(weight=0.4),
        "weight 0": steered(weight=0.0),
        "outside its window": steered(start_percent=0.9),
        "left": steered(mask=left),
        "right": steered(mask=right),
        "curve": steered(curve=curve),
        "layer weights": steered(layer_weights=layers),
        "regions": steered(regions=regions),
        "a prompt's own": steered(None),
        "two": lambda model: steered(others, weight=0.5)(steered()(model)),
    }


@pytest.fixture
def prompts(pack: Pack, easyref: Any) -> dict[str, Any]:
    """Prompts other than the usual one."""
    own = random_tokens(pack, easyref, 8)
    return {"a prompt's own": pack.run("EasyRefSetConditioning", text(), own, 1.0)}


@pytest.fixture
def expected(
    variants: dict[str, Variant], prompts: dict[str, Any], unet: Any
) -> dict[str, torch.Tensor]:
    """Each one's uncompiled prediction; all differ, except those that are off."""
    found = {
        name: predict(variant(unet), 5.0, positive=prompts.get(name))
        for name, variant in variants.items()
    }
    on = [found[name] for name in found if name not in ("weight 0", "outside its window")]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(on) for b in on[:i])
    return found


def check(name: str, model: Any, expected: dict[str, torch.Tensor], prompt: Any = None) -> None:
    found = predict(model, 5.0, positive=prompt)
    torch.testing.assert_close(
        found, expected[name], rtol=0, atol=1e-6, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("compiled_first", [True, False], ids=["compile-apply", "apply-compile"])
@pytest.mark.parametrize("order", [VARIANTS, VARIANTS[::-1]], ids=["plain-first", "plain-last"])
def test_a_result_does_not_depend_on_what_a_compiled_model_sampled_before(
    variants: dict[str, Variant],
    prompts: dict[str, Any],
    expected: dict[str, torch.Tensor],
    unet: Any,
    order: tuple[str, ...],
    compiled_first: bool,
) -> None:
    assert set(order) == set(variants)

    def make(name: str) -> Any:
        if compiled_first:
            return variants[name](compile_model(unet))
        return compile_model(variants[name](unet))

    for name in (*order, *order[:1], *order):
        check(name, make(name), expected, prompts.get(name))
    assert traces() > 0, "nothing was compiled, so nothing was tested"


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_model_compiled_in_parts_is_exact_too(
    variants: dict[str, Variant],
    expected: dict[str, torch.Tensor],
    unet: Any,
    compiled_first: bool,
) -> None:
    parts = ("diffusion_model.middle_block.1.transformer_blocks.0",)
    for name in ("plain", "steered", "other tokens", "plain", "left", "right", "plain"):
        variant = variants[name]
        compiled = compile_model(unet, parts)
        result = variant(compiled) if compiled_first else compile_model(variant(unet), parts)
        check(name, result, expected)
    assert traces() > 0


@pytest.mark.parametrize(
    "part", ["diffusion_model", "diffusion_model.middle_block.1.transformer_blocks.0"]
)
def test_a_compiled_module_that_another_node_inserts_is_exact_too(
    pack: Pack, easyref: Any, tokens: Any, unet: Any, part: str
) -> None:
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    compiled = unet.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    module = torch.compile(unet.get_model_object(part), backend="eager", options=options)
    compiled.add_object_patch(part, module)
    for weight in (1.0, 0.4):
        # ComfyUI finds no weights for a LoRA below such a module.
        found, expected = (
            predict(apply(pack, model, easyref, tokens, weight=weight, lora_strength=0.0), 5.0)
            for model in (compiled, unet)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert traces() == 0


def test_a_model_compiled_in_place_is_not_traced_with_references(
    pack: Pack, easyref: Any, tokens: Any, unet: Any
) -> None:
    """With all guards on it would be traced again for each change, up to PyTorch's limit."""
    expected = predict(apply(pack, unet, easyref, tokens), 5.0)
    model = golden_unet(pack)
    model.model.diffusion_model.compile(backend="eager")
    found = predict(apply(pack, model, easyref, tokens), 5.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert traces() == 0
    predict(model)
    assert traces() > 0, "nothing was compiled, so nothing was tested"


def test_threads_leave_the_stance_as_it_was(pack: Pack) -> None:
    part = pack.part("nodes.host.compiled")
    inside, leave = threading.Event(), threading.Event()

    @torch.compile(backend="eager")
    def compiles() -> bool:
        return torch.compiler.is_compiling()

    seen: list[bool] = []

    def other() -> None:
        with part.uncompiled():
            seen.append(compiles())
            inside.set()
            leave.wait(10)
            seen.append(compiles())

    assert compiles()
    with part.uncompiled():
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert not compiles(), "the other thread is still inside"
    leave.set()
    thread.join()
    assert seen == [False, False]
    assert compiles()


def test_one_warning_says_that_references_run_uncompiled(
    pack: Pack,
    variants: dict[str, Variant],
    unet: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pack.part("nodes.host.compiled")._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            predict(variants["steered"](compile_model(unet)))
    assert caplog.text.count("uncompiled") == 1
