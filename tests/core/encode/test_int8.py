"""An encoder whose MLLM has int8 weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from torch import nn

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.convert import convert_adapter
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.qwen2vl import casting
from easyref_core.qwen2vl.config import MllmConfig
from easyref_core.qwen2vl.int8 import int8_layers
from easyref_core.qwen2vl.prompt import PromptTokenizer

FOUR = "four_refs_prompt"


def build(adapter: Any = goldens.ADAPTER, **options: Any) -> EasyRefEncoder:
    given = {"operations": casting, "int8": True, **options}
    return plan_encoder(load_checkpoint(adapter), goldens.MLLM).build(**given)


@pytest.fixture
def tokens(tokenizer: PromptTokenizer) -> Callable[[EasyRefEncoder], torch.Tensor]:
    def run(encoder: EasyRefEncoder) -> torch.Tensor:
        group, prompt = goldens.references(FOUR), goldens.user_prompt(FOUR)
        size = goldens.IMAGE_SIZE
        return goldens.encode(encoder, tokenizer, group, prompt, image_size=size).cond

    return run


def loss(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_matrices_of_the_mllm_are_int8_and_nothing_else() -> None:
    encoder, plain = build(), build(int8=False)
    rounded = set()
    for name, layer in encoder.named_modules():
        scale = getattr(layer, "weight_scale", None)
        before = plain.get_submodule(name)
        if scale is None:
            for part, weight in layer.named_parameters(recurse=False):
                assert torch.equal(weight, getattr(before, part)), name
            continue
        rounded.add(name)
        assert layer.weight.dtype == torch.int8
        assert scale.shape == (layer.out_features,)
        error = (layer.weight * scale[:, None] - before.weight).abs()
        assert (error <= scale[:, None] * 0.50001).all()
        assert layer.bias is None or torch.equal(layer.bias, before.bias)
    body = {
        f"multimodal_llm.{name}"
        for name, layer in plain.multimodal_llm.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert rounded == body - {"multimodal_llm.visual.patch_embed.proj"}


def test_the_sums_are_those_of_weights_multiplied_out(
    tokens: Callable[[EasyRefEncoder], torch.Tensor],
) -> None:
    encoder, plain = build(), build(int8=False)
    for name, layer in encoder.named_modules():
        if getattr(layer, "weight_scale", None) is not None:
            whole = layer.weight.float() * layer.weight_scale[:, None]
            plain.get_submodule(name).weight = nn.Parameter(whole, requires_grad=False)
    assert goldens.difference(tokens(encoder), tokens(plain)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_stay_near_the_official_ones(
    tokens: Callable[[EasyRefEncoder], torch.Tensor], dtype: torch.dtype
) -> None:
    encoder = build(dtype=dtype, compute_dtype=dtype)
    wanted = goldens.expected()[f"full.{FOUR}.tokens"]
    assert loss(tokens(encoder).float(), wanted) < 0.05
    others = {weight.dtype for weight in encoder.parameters()}
    assert others == {torch.int8, dtype}


def test_sums_that_float16_cannot_hold_come_out() -> None:
    layer = casting.Linear(4096, 1, bias=False)
    layer.weight = nn.Parameter(torch.full((1, 4096), 127, dtype=torch.int8), requires_grad=False)
    layer.weight_scale = torch.tensor([1e-4])
    found = layer(torch.ones(1, 4096, dtype=torch.float16))
    assert float(found) == pytest.approx(4096 * 127 * 1e-4, rel=2e-3)


def test_int8_files_are_computed_with_as_they_are(
    tokens: Callable[[EasyRefEncoder], torch.Tensor], tmp_path: Path
) -> None:
    """One scale for the whole matrix, as in other tools' files: rounded again, it would change."""
    name = "multimodal_llm.model.layers.0.mlp.up_proj"
    path = tmp_path / "int8.safetensors"
    convert_adapter(load_checkpoint(goldens.ADAPTER), path, "int8")
    tensors = goldens.load_file(path)
    tensors[f"{name}.weight"] //= 2
    tensors[f"{name}.weight_scale"] = torch.tensor(0.01)
    goldens.write(path, tensors)
    layer = build(path).get_submodule(name)
    assert torch.equal(layer.weight, tensors[f"{name}.weight"])
    assert layer.weight_scale.tolist() == [tensors[f"{name}.weight_scale"]] * layer.out_features
    wide = build(path, int8=False)
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}
    assert goldens.difference(tokens(build(path)), tokens(wide)) < 2e-5


def test_a_real_encoder_takes_little_more_than_half() -> None:
    """The README's gigabytes."""
    encoder = EasyRefEncoder(MllmConfig(), 64, 2048, operations=casting, device="meta")
    numbers = sum(weight.numel() for weight in encoder.parameters())
    layers = [encoder.multimodal_llm.get_submodule(n) for n in int8_layers(encoder.multimodal_llm)]
    saved = sum(layer.weight.numel() - 4 * layer.out_features for layer in layers)
    assert round(2 * numbers / 1e9, 1) == 4.4
    assert round((2 * numbers - saved) / 1e9, 1) == 2.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(
    tokens: Callable[[EasyRefEncoder], torch.Tensor], tmp_path: Path, value: float
) -> None:
    tensors = goldens.adapter_tensors()
    name = "multimodal_llm.model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    encoder = build(goldens.write(tmp_path / "a.safetensors", tensors))
    with goldens.refused(name, "not numbers"):
        tokens(encoder)


def test_layers_that_know_no_scale_are_refused() -> None:
    with pytest.raises(TypeError, match=r"qwen2vl\.casting"):
        build(operations=nn)


def test_no_two_matrices_are_wide_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from easyref_core.encode import plan_encoder as module

    rounded, seen = module.round_rows, []

    def watch(weight: torch.Tensor, dtype: torch.dtype) -> Any:
        assert [wide for wide in seen if wide() is not None] == []
        seen.append(weakref.ref(weight.untyped_storage()))
        return rounded(weight, dtype)

    monkeypatch.setattr(module, "round_rows", watch)
    build()
    assert len(seen) > 20
