"""The MLLM with int8 weights under ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyhost import CASE, GOLDEN, GOLDEN_MLLM, Pack, golden, put_adapter
from goldens import adapter_tensors, user_prompt

UP = "multimodal_llm.model.layers.0.mlp.up_proj"


def int8_easyref(pack: Pack) -> Any:
    return pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "int8")


def loss(tokens: Any) -> float:
    """Relative to the tokens of the official code."""
    wanted = golden(f"full.{CASE}.tokens")
    return float((tokens.cond - wanted).norm() / wanted.norm())


def test_int8_takes_a_byte_for_each_weight_of_the_mllm(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    easyref = int8_easyref(pack)
    found = loss(encode(easyref))
    assert 1e-3 < found < 0.05
    patcher = easyref.encoder.patcher
    layer = patcher.model.get_submodule(UP)
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.shape == (layer.out_features,)
    assert patcher.model.mllm_final_layer.layers[0].mlp.up_proj.weight.dtype == torch.float32
    held = {*patcher.model.parameters(), *patcher.model.buffers()}
    assert patcher.model_size() == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_int8_weights_that_are_loaded_in_part_give_the_same_tokens(
    pack: Pack, encode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    import comfy.model_management as mm

    easyref = int8_easyref(pack)
    whole = encode(easyref)
    patcher = easyref.encoder.patcher
    patcher.detach()
    easyref.encoder.forget()

    def load_part(models: list[Any], **_: Any) -> None:
        (model,) = models
        model.patch_model(model.load_device, lowvram_model_memory=int(patcher.size * share) or 1)

    monkeypatch.setattr(mm, "load_models_gpu", load_part)
    tokens = encode(easyref, prompt=user_prompt(CASE))
    assert patcher.model.model_lowvram
    assert torch.equal(tokens.cond, whole.cond)


def test_the_tokens_of_int8_are_never_those_of_another_precision(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    first = encode(pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto"))
    rounded = encode(int8_easyref(pack))
    assert not torch.equal(first.cond, rounded.cond)
    assert torch.equal(encode(int8_easyref(pack)).cond, rounded.cond)


def test_comfyui_builds_the_same_int8_encoder_again(pack: Pack, encode: Callable[..., Any]) -> None:
    easyref = int8_easyref(pack)
    encode(easyref)
    patcher = easyref.encoder.patcher
    build, arguments = patcher.cached_patcher_init
    again = build(*arguments, disable_dynamic=True).model.state_dict()
    for name, weight in patcher.model.state_dict().items():
        assert torch.equal(again[name], weight), name


def test_the_memory_of_an_int8_weight_that_is_converted_is_asked_for(
    pack: Pack, encode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    asked: list[int] = []
    load = mm.load_models_gpu

    def watch(models: Any, memory_required: int = 0, **others: Any) -> Any:
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **others)

    monkeypatch.setattr(mm, "load_models_gpu", watch)
    for precision in ("fp32", "int8"):
        encode(pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, precision), prompt="for memory")
    encoder = int8_easyref(pack)
    encode(encoder, prompt="again")
    model = encoder.encoder.patcher.model
    largest = max(p.numel() for p in model.parameters() if p.dtype == torch.int8)
    assert asked[1] - asked[0] == 4 * largest


def test_a_half_precision_file_with_int8_stays_small(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    half = {name: tensor.half() for name, tensor in adapter_tensors().items()}
    name = put_adapter(pack, "half_int8.safetensors", half)
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "int8")
    assert loss(encode(easyref)) < 0.05
    dtypes = {tensor.dtype for tensor in easyref.encoder.patcher.model.parameters()}
    assert dtypes == {torch.int8, torch.float16}


@pytest.mark.parametrize("by_row", [True, False])
def test_what_comfyui_rounds_to_int8_is_read(
    pack: Pack, encode: Callable[..., Any], by_row: bool
) -> None:
    from comfy import quant_ops

    if "int8_tensorwise" not in quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI has no int8")
    import comfy.ops

    tensors = adapter_tensors()
    weight = tensors.pop(f"{UP}.weight")
    rounded = quant_ops.QuantizedTensor.from_float(
        weight, "TensorWiseINT8Layout", per_channel=by_row
    )
    operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    layer = operations.Linear(*reversed(weight.shape), bias=False)
    layer.weight = torch.nn.Parameter(rounded, requires_grad=False)
    layer.quant_format, layer.layout_type = "int8_tensorwise", "TensorWiseINT8Layout"
    tensors |= layer.state_dict(prefix=f"{UP}.")
    assert f"{UP}.comfy_quant" in tensors
    name = put_adapter(pack, f"by_comfyui_{by_row}.safetensors", tensors)
    for precision in ("fp32", "int8"):
        easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, precision)
        assert loss(encode(easyref)) < 0.05
        found = easyref.encoder.patcher.model.get_submodule(UP)
        if precision == "int8":
            assert torch.equal(found.weight, tensors[f"{UP}.weight"])
        else:
            assert torch.equal(found.weight, rounded.dequantize())
