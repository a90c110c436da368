"""Adapters that pool the MLLM's layers in ComfyUI: encoded, weighed, split among devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import GOLDEN_MLLM, Pack, apply, golden, predict, put_adapter, text
from dynamic_vram import META, Gpu
from goldens import IMAGE_SIZE, difference, pictures, pooled_adapter, user_prompt

CASE = "four_refs_prompt"
EVEN = {"text_layers": "1", "picture_layers": "1", "text_weight": 1.0, "picture_weight": 1.0}
Encode = Callable[..., Any]


@pytest.fixture(scope="module")
def pooled_file(pack: Pack) -> str:
    return put_adapter(pack, "pooled.safetensors", pooled_adapter("dla", "lap"))


@pytest.fixture
def pooled(pack: Pack, pooled_file: str) -> Any:
    """The golden adapter with layer pooling, as the Loader gives it."""
    return pack.run("EasyRefLoader", pooled_file, GOLDEN_MLLM, "auto")


@pytest.fixture
def encode(pack: Pack) -> Encode:
    group = pack.part("easyref_core.encode.group").Reference
    references = tuple(group(picture) for picture in pictures(CASE))

    def run(easyref: Any, node: str = "EasyRefEncode", **settings: Any) -> Any:
        given = {"aggregation": "dla", "image_size": IMAGE_SIZE, "references": references}
        return pack.run(node, easyref, **({"prompt": user_prompt(CASE)} | given | settings))

    return run


def layers(pack: Pack, preset: str = "even", **changed: Any) -> Any:
    return pack.nodes["EasyRefMllmLayers"].execute(preset, **(EVEN | changed))


@pytest.mark.parametrize("shape", ["blocks", "scores"])
def test_new_pools_give_the_tokens_of_the_plain_adapter(
    pack: Pack, encode: Encode, shape: str
) -> None:
    tensors = pooled_adapter("dla", "lap", shape=shape, seed=None)
    name = put_adapter(pack, f"new_{shape}.safetensors", tensors)
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    plain = encode(easyref, aggregation="easyref")
    for aggregation in ("dla", "lap"):
        found = encode(easyref, aggregation=aggregation)
        assert torch.equal(found.cond, plain.cond)
        assert torch.equal(found.uncond, plain.uncond)
    assert difference(plain.cond, golden(f"full.{CASE}.tokens")) < 1e-4


def test_pooled_tokens_are_applied_like_any(
    pack: Pack, spy: Spy, unet: Any, pooled: Any, easyref: Any, encode: Encode
) -> None:
    tokens = encode(pooled)
    plain = encode(easyref, aggregation="easyref")
    assert difference(tokens.cond, plain.cond) > 0.01
    # The plain adapter applies them too: it is the same one.
    predict(spy.watch(apply(pack, unet, easyref, tokens)), cfg=5.0)
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    assert spy.max_error(truth) < 1e-4


def test_an_adapter_without_pooling_says_what_it_has(
    easyref: Any, encode: Encode, pack: Pack
) -> None:
    with pack.refused("golden.safetensors has no weights for aggregation 'dla'", "easyref"):
        encode(easyref)
    with pack.refused("mllm_layers weighs the layers that are pooled", "disconnect mllm_layers"):
        encode(easyref, aggregation="easyref", mllm_layers=layers(pack)[0])


@pytest.mark.keeps
def test_other_weights_of_layers_run_no_layer_of_the_body_again(
    pack: Pack, pooled: Any, encode: Encode
) -> None:
    plain = encode(pooled)
    calls: list[Any] = []
    body = pooled.encoder.patcher.model.multimodal_llm
    for layer in (*body.model.layers, *body.visual.blocks):
        layer.register_forward_hook(lambda *given: calls.append(given))
    even, early = (encode(pooled, mllm_layers=layers(pack, p)[0]) for p in ("even", "early"))
    inspected = encode(pooled, "EasyRefInspect", mllm_layers=layers(pack, "late")[0])
    assert not calls
    assert difference(even.cond, plain.cond) <= 1e-5
    assert difference(early.cond, plain.cond) > 1e-3
    assert inspected.shape[0] == 4


def test_the_node_says_its_factors(pack: Pack) -> None:
    weights, text = layers(pack, "early", picture_layers="0, 2", text_weight=0.5)
    of_text, of_pictures = weights.factors(28)
    assert (of_text[0], of_text[-1]) == (1.75, 0.25)
    assert (of_pictures[0], of_pictures[-1]) == (0.0, 0.5)
    assert weights.attention == (0.5, 1.0)
    first, second = text.splitlines()
    assert first.startswith("text: 1.75, ")
    assert first.endswith("0.25; attention 0.5")
    assert second.startswith("pictures: 0, ")


@pytest.mark.parametrize("given", ["1;2", "nan", "1, -1", "11", ""])
def test_factors_that_cannot_be_are_refused(pack: Pack, given: str) -> None:
    if not given:
        assert layers(pack, text_layers=given).ui == layers(pack).ui
        return
    with pack.refused("text"):
        layers(pack, text_layers=given)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_partly_loaded_encoder_pools_the_same(
    pooled: Any, encode: Encode, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    import comfy.model_management as mm

    whole = encode(pooled)
    patcher = pooled.encoder.patcher
    patcher.detach()
    pooled.encoder.forget()

    def load_part(models: list[Any], **kwargs: Any) -> None:
        (model,) = models
        model.patch_model(model.load_device, lowvram_model_memory=int(patcher.size * share) or 1)

    monkeypatch.setattr(mm, "load_models_gpu", load_part)
    assert difference(encode(pooled, prompt="a boat").cond, whole.cond) > 0.01
    assert difference(encode(pooled).cond, whole.cond) <= 1e-5
    assert patcher.model.model_lowvram


def test_every_weight_of_the_pools_can_stay_on_another_device(pooled: Any, encode: Encode) -> None:
    encode(pooled)
    encoder = pooled.encoder.patcher.model
    plain = [
        f"{name}.{weight}"
        for name, module in encoder.named_modules()
        for weight, _ in module.named_parameters(recurse=False)
        if not hasattr(module, "comfy_cast_weights")
    ]
    assert plain == []
    assert sorted(name for name, _ in encoder.named_buffers()) == [
        "mllm_final_layer.reference_tokens",
        *(f"mllm_layer_pooling.{pool}.weighted_sum.weight" for pool in ("all", "image", "text")),
    ]
    assert encoder.state_dict().keys() == pooled.encoder.plan().sources.keys()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_pools_about_the_same(
    pack: Pack, pooled: Any, pooled_file: str, encode: Encode, precision: str
) -> None:
    half = pack.run("EasyRefLoader", pooled_file, GOLDEN_MLLM, precision)
    found, wanted = encode(half).cond, encode(pooled).cond
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1


def test_one_byte_weights_leave_the_weights_of_layers_as_they_are(
    pack: Pack, pooled_file: str, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "fp8_e4m3fn_text_enc", True)
    easyref = pack.run("EasyRefLoader", pooled_file, GOLDEN_MLLM, "auto")
    assert torch.isfinite(encode(easyref).cond).all()
    pool = easyref.encoder.patcher.model.mllm_layer_pooling["text"]
    assert pool.weighted_sum.weight.dtype == torch.float32
    assert pool.blocks[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn


@pytest.mark.keeps
def test_pools_load_dynamically_onto_a_gpu(
    pack: Pack, gpu: Gpu, pooled: Any, encode: Encode
) -> None:
    with gpu.waiting_allowed():
        encode(pooled)
    patcher = pooled.encoder.patcher
    assert (patcher.is_dynamic(), patcher.load_device) == (True, META)
    pool = patcher.model.mllm_layer_pooling["text"]
    assert hasattr(pool.blocks[0].mlp.up_proj, "_v")
    kept = pooled.encoder._cache._pictures._items.values()
    assert {tensor.device.type for tensor in kept} == {"cpu"}


def test_the_page_gets_each_presets_factors(pack: Pack) -> None:
    """For the bars on the node."""
    preset = pack.nodes["EasyRefMllmLayers"].GET_NODE_INFO_V1()["input"]["required"]["preset"][1]
    assert list(preset["bars"]) == preset["options"]
    for name, bars in preset["bars"].items():
        weights = layers(pack, name)[0]
        assert (tuple(bars["text"]), tuple(bars["picture"])) == weights.factors(28)
        assert tuple(bars["attention"]) == weights.attention
