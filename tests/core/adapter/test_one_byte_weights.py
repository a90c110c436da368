"""Adapters stored in one-byte floats, with which torch can compute hardly anything."""

from __future__ import annotations

from collections.abc import Callable

import goldens
import pytest
import torch
from torch import nn

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.adapter.key_values import _has_dtype, lora_weights, project_tokens
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import Reference, plan_group
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import plan_encoder, read_sources
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

SMALL = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def one_byte(save: Callable) -> Callable[[torch.dtype], AdapterCheckpoint]:
    return lambda dtype: save({n: t.to(dtype) for n, t in goldens.adapter_tensors().items()})


@pytest.mark.parametrize("dtype", SMALL)
def test_a_one_byte_adapter_encodes_and_projects(
    one_byte: Callable, tokenizer: PromptTokenizer, dtype: torch.dtype
) -> None:
    checkpoint = one_byte(dtype)
    assert checkpoint.dtype == str(dtype).removeprefix("torch.")
    encoder_plan = plan_encoder(checkpoint, goldens.MLLM)
    group = goldens.references("one_ref_prompt")
    plan = plan_group(encoder_plan, tokenizer, group, "", image_size=goldens.IMAGE_SIZE)
    tokens = encode_references(encoder_plan.build(), plan)
    assert len(project_tokens(checkpoint, tokens).layers) == len(checkpoint.cross_attention)
    assert {weight.dtype for weight in lora_weights(checkpoint).values()} == {dtype}


def test_damage_in_one_byte_weights_is_named(save: Callable) -> None:
    tensors = goldens.adapter_tensors()
    name = next(n for n in tensors if "_lora.up" in n)
    tensors[name][0, 0] = float("nan")
    damaged = save({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()})
    with goldens.refused("changed.safetensors", name, "not numbers"):
        lora_weights(damaged)


def test_a_damaged_weight_of_the_encoder_is_named(tokenizer: PromptTokenizer) -> None:
    encoder: EasyRefEncoder = goldens.random_encoder()
    final = encoder.mllm_final_layer
    bad = final.reference_tokens.detach().clone()
    bad[0, 0] = float("nan")
    final.reference_tokens = nn.Parameter(bad.to(torch.float8_e4m3fn), requires_grad=False)
    group: list[Reference] = goldens.references("one_ref_prompt")

    def encode() -> ReferenceTokens:
        return goldens.encode(encoder, tokenizer, group, "", image_size=84)

    with goldens.refused("mllm_final_layer.reference_tokens", "damaged"):
        encode()


@pytest.mark.parametrize("dtype", SMALL)
def test_stored_in_one_byte_what_would_overflow_keeps_its_dtype(
    save: Callable, dtype: torch.dtype
) -> None:
    """Qwen2's biases are larger than what fits into one byte."""
    tensors = {n: t.half() for n, t in goldens.adapter_tensors().items()}
    state = read_sources(plan_encoder(save(tensors), goldens.MLLM).sources, dtype)
    for name, weight in state.items():
        small = weight.ndim == 1 or name == "mllm_final_layer.reference_tokens"
        assert weight.dtype == (torch.float16 if small else dtype), name


@pytest.mark.parametrize("device", ["mps", "privateuseone", "cuda"])
def test_weights_are_sent_only_in_what_a_device_knows(device: str) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
    sent = [kind for kind in kinds if _has_dtype(torch.device(device), kind)]
    assert sent == list(kinds if device == "cuda" else kinds[:2])
