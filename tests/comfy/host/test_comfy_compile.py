"""Compiled models: whatever was sampled before, every result equals the uncompiled one.

Backend "eager" traces as every backend does and compiles nothing; the node's own guard filter is
what makes traces keep values.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from comfyhost import (
    Pack,
    apply,
    euler,
    golden_unet,
    guider,
    latents,
    predict,
    random_text,
    random_tokens,
    sigmas,
    stock,
    text,
)

UNET = "diffusion_model"
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


class Backend:
    """Compiles nothing, and notes of each graph whether references are added in it."""

    def __init__(self) -> None:
        self.graphs: list[bool] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        targets = [str(node.target) for node in graph.graph.nodes]
        self.graphs.append(any("add_references" in target for target in targets))
        return graph.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # older cores copy a model's options deeply


@pytest.fixture(autouse=True)
def _fresh_traces() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """With PyTorch's attention, as ComfyUI has it on most GPUs. Its choice for a CPU asks for free
    memory, which PyTorch cannot trace."""
    import comfy.ldm.modules.attention as attention

    for module in (attention, pack.part("nodes.sampling.layer")):
        for name in ("optimized_attention", "optimized_attention_masked"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, attention.attention_pytorch)
    return Backend()


def compile_model(
    model: Any, keys: tuple[str, ...] = (UNET,), backend: Any = "eager", **settings: Any
) -> Any:
    """What the node does, with a backend that is there on every computer."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    compiled = model.clone()
    settings = settings or {"options": {"guard_filter_fn": skip_torch_compile_dict}}
    set_torch_compile_wrapper(compiled, backend, keys=list(keys), **settings)
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


@pytest.mark.parametrize(
    ("compiled_first", "order"),
    [(True, VARIANTS), (False, VARIANTS[::-1])],
    ids=["compile-apply, plain first", "apply-compile, plain last"],
)
def test_a_result_does_not_depend_on_what_a_compiled_model_sampled_before(
    backend: Backend,
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
            return variants[name](compile_model(unet, backend=backend))
        return compile_model(variants[name](unet), backend=backend)

    for name in (*order, *order[:1], *order):
        check(name, make(name), expected, prompts.get(name))
    assert sorted(backend.graphs) == [False, True], "one for plain calls, one for all others"


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
        with part.uncompiled("a test"):
            seen.append(compiles())
            inside.set()
            leave.wait(10)
            seen.append(compiles())

    assert compiles()
    with part.uncompiled("a test"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert not compiles(), "the other thread is still inside"
    leave.set()
    thread.join()
    assert seen == [False, False]
    assert compiles()


def test_a_run_compiles_in_its_first_step_alone(
    backend: Backend, variants: dict[str, Variant], unet: Any
) -> None:
    """Weights change from step to step, everything from run to run."""
    for name in ("steered", "curve", "outside its window", "left", "two"):
        model = variants[name](compile_model(unet, backend=backend))
        steps = sigmas(model, 900.0, 700.0, 400.0, 200.0, 50.0)
        euler(guider(model, 5.0), latents(), steps)
        assert backend.graphs == [True]


def test_threads_sample_with_their_own_references(
    pack: Pack,
    backend: Backend,
    variants: dict[str, Variant],
    expected: dict[str, torch.Tensor],
    unet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads of ComfyUI have models of their own, as on several GPUs."""
    import comfy.model_management as mm

    names = ("steered", "other tokens", "left")
    models = {
        name: variants[name](compile_model(golden_unet(pack), backend=backend)) for name in names
    }
    predict(models["steered"], 5.0)  # compiled; all have the same code
    # ComfyUI's own list of loaded models is not thread-safe.
    lock, load = threading.Lock(), mm.load_models_gpu

    def load_alone(*args: Any, **kwargs: Any) -> None:
        with lock:
            load(*args, **kwargs)

    monkeypatch.setattr(mm, "load_models_gpu", load_alone)
    start = threading.Barrier(len(names))

    def sample(name: str) -> list[torch.Tensor]:
        with torch.inference_mode():
            start.wait(10)
            return [predict(models[name], 5.0) for _ in range(3)]

    with ThreadPoolExecutor(len(names)) as pool:
        together = dict(zip(names, pool.map(sample, names), strict=True))
    for name, results in together.items():
        for result in results:
            torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-6)
    assert backend.graphs == [True]


def test_nothing_is_left_on_a_model_whose_layer_fails(
    pack: Pack,
    backend: Backend,
    variants: dict[str, Variant],
    expected: dict[str, torch.Tensor],
    unet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = variants["steered"](compile_model(unet, backend=backend))
    before = dict(vars(unet.model)), dict(unet.model._modules)

    def fail(*args: Any) -> None:
        raise pack.error("a fault")

    with monkeypatch.context() as patch:
        patch.setattr(pack.part("nodes.sampling.layer").LayerScales, "shares", fail)
        with pytest.raises(pack.error, match="a fault"):
            predict(model, 5.0)
    assert backend.graphs == [True], "the layer did not fail in compiled code"
    assert unet.model._modules == before[1]
    assert set(vars(unet.model)) == set(before[0])
    assert pack.part("nodes.sampling.layer_operator")._running.get(None) is None
    check("steered", model, expected)
    check("plain", compile_model(unet, backend=backend), expected)


def another_packs_patch(model: Any) -> Any:
    patched = model.clone()
    patched.set_model_attn1_output_patch(lambda n, options: n * 0.5)
    return patched


def another_packs_slot(model: Any) -> Any:
    patched = model.clone()
    patched.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0, 0)
    return patched


def another_packs_wrapper(model: Any) -> Any:
    patched = model.clone()
    patched.add_wrapper("diffusion_model", lambda executor, *args, **kwargs: executor(*args) * 0.5)
    return patched


@pytest.mark.parametrize("patch", [another_packs_patch, another_packs_slot, another_packs_wrapper])
def test_what_another_node_patches_is_not_traced(
    backend: Backend,
    variants: dict[str, Variant],
    unet: Any,
    caplog: pytest.LogCaptureFixture,
    patch: Variant,
) -> None:
    expected = predict(variants["steered"](patch(unet)), 5.0)
    found = predict(variants["steered"](patch(compile_model(unet, backend=backend))), 5.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert backend.graphs == []


def test_cuda_graphs_which_keep_their_references_run_uncompiled(
    variants: dict[str, Variant], expected: dict[str, torch.Tensor], unet: Any
) -> None:
    compiled = compile_model(unet, backend="inductor", mode="reduce-overhead")
    check("steered", variants["steered"](compiled), expected)
    assert traces() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "cudagraphs"},
        {"backend": "inductor", "mode": "max-autotune"},
        {"backend": "inductor", "options": {"triton.cudagraphs": True}},
    ],
    ids=["backend", "mode", "option"],
)
def test_all_settings_with_cuda_graphs_are_known(pack: Pack, settings: dict[str, Any]) -> None:
    part = pack.part("nodes.host.compiled")
    with pytest.raises(part.CannotCompile, match="CUDA graphs"):
        part.CompiledFunction(len, settings)


def test_a_mode_without_cuda_graphs_gives_inductor_its_options(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = pack.part("nodes.host.compiled")
    given = {}
    monkeypatch.setattr(part.torch, "compile", lambda function, **settings: given.update(settings))
    settings = {"mode": "max-autotune-no-cudagraphs", "dynamic": True}
    part.CompiledFunction(len, {"backend": "inductor", "options": None, **settings})
    assert given["mode"] is None
    assert given["dynamic"]
    assert given["options"]["max_autotune"]


def test_what_cannot_be_compiled_in_one_piece_is_tried_once(
    pack: Pack,
    variants: dict[str, Variant],
    expected: dict[str, torch.Tensor],
    unet: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ComfyUI's attention for a CPU asks the system for its free memory."""
    pack.part("nodes.host.compiled")._warn_once.cache_clear()
    compiled = compile_model(unet, backend="eager")
    for name in ("steered", "other tokens", "left"):
        check(name, variants[name](compiled), expected)
    assert torch._dynamo.utils.counters["unimplemented"].total() == 1
    assert caplog.text.count("cannot compile it in one piece") == 1


def test_a_controlnet_acts_in_compiled_calls_too(
    pack: Pack, backend: Backend, demo: Any, demo_easyref: Any
) -> None:
    hint = torch.rand((1, 128, 128, 3), generator=torch.Generator().manual_seed(6))
    positive, negative = random_text(1, pooled=64), random_text(2, pooled=64)
    positive = stock("nodes.ControlNetApply", positive, demo.control_net, hint, 1.0)
    for side in (positive, negative):
        side[0][1]["control_apply_to_uncond"] = True
    texts = {"positive": positive, "negative": negative}
    tokens = random_tokens(pack, demo_easyref, seed=3)
    expected, found = (
        predict(apply(pack, model, demo_easyref, tokens), 5.0, latents(1), **texts)
        for model in (demo.model, compile_model(demo.model, backend=backend))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert backend.graphs == [True]


def test_calls_without_comfyuis_own_sampling_run_uncompiled(
    backend: Backend, variants: dict[str, Variant], unet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Only a run brings the wrappers into order; here they are as the nodes add them."""
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP, copy_nested_dicts
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

    found = []

    def ask_again(args: Any) -> Any:
        options = copy_nested_dicts(args["model_options"])
        wrappers = options["transformer_options"]["wrappers"][WrappersMP.APPLY_MODEL]
        wrappers[COMPILE_KEY] = wrappers.pop(COMPILE_KEY)
        conds = [args["uncond"], args["cond"]]
        for chosen in (args["model_options"], options):
            details = args["input"], args["sigma"], chosen
            found.append(comfy.samplers.calc_cond_batch(args["model"], conds, *details))
        return args["denoised"]

    model = compile_model(variants["steered"](unet), backend=backend)
    model.set_model_sampler_post_cfg_function(ask_again)
    predict(model, 5.0)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert "without ComfyUI's own sampling" in caplog.text
    assert backend.graphs == [True]


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
