"""Scaled fp8 and int8 are read as what it stands for, wherever an adapter or an MLLM uses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import BODY, Tensors

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.key_values import lora_weights, project_tokens
from easyref_core.encode.plan_encoder import plan_encoder, read_sources
from easyref_core.tokens.reference_tokens import ReferenceTokens
from easyref_core.weight_file import open_weight_file

FP8 = torch.float8_e4m3fn
KEY = f"unet.{next(iter(goldens.LAYERS))}.processor.to_k_ip.weight"


def beside(name: str) -> str:
    """Of a tensor that belongs to the weight `KEY`."""
    return KEY.removesuffix("weight") + name


def scaled(tensors: Mapping[str, torch.Tensor], suffix: str, rows: bool = False) -> Tensors:
    """Every matrix as fp8 and its scale."""
    found: Tensors = {}
    for name, weight in tensors.items():
        found[name] = weight
        if name.endswith(".weight") and weight.ndim == 2:
            size = weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().max()
            scale = (size.float() / 448).clamp(min=1e-9)
            found[name] = (weight / scale).to(FP8)
            found[name.removesuffix("weight") + suffix] = scale
    return found


def plain(tensors: Tensors, suffix: str) -> Tensors:
    """The same weights, multiplied out."""
    return {
        name: weight.float() * tensors.get(name.removesuffix("weight") + suffix, 1)
        for name, weight in tensors.items()
        if not name.endswith(suffix)
    }


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_an_adapter_in_scaled_fp8_is_the_one_it_was_made_from(
    whole: Tensors, tmp_path: Path, suffix: str, rows: bool
) -> None:
    stored = scaled(whole, suffix, rows)
    extra = {"scaled_fp8": torch.zeros(2).to(FP8), beside("input_scale"): torch.ones(())}
    found = load_checkpoint(goldens.write(tmp_path / "a.safetensors", stored | extra))
    wanted = load_checkpoint(goldens.write(tmp_path / "b.safetensors", plain(stored, suffix)))
    assert not found.ignored
    for dtype in (torch.float32, torch.bfloat16, None):
        ours, theirs = (read_sources(plan_encoder(c).sources, dtype) for c in (found, wanted))
        assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    cond = torch.randn(1, 16, goldens.TOKEN_WIDTH)
    tokens = ReferenceTokens(cond, cond, found.identity)
    ours, theirs = (project_tokens(c, tokens).layers for c in (found, wanted))
    assert all(torch.equal(ours[n][i], theirs[n][i]) for n in theirs for i in (0, 1))
    ours, theirs = lora_weights(found), lora_weights(wanted)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_the_scale_is_part_of_the_identity(whole: Tensors, save: Callable) -> None:
    stored = scaled(whole, "scale_weight")
    first = save(stored).identity
    stored[beside("scale_weight")] *= 1.01
    assert save(stored).identity != first


def test_a_scaled_mllm_folder_is_read_too(whole: Tensors, tmp_path: Path, save: Callable) -> None:
    stored = scaled(goldens.bare_mllm(whole), "weight_scale")
    adapter = save(goldens.without(whole, BODY))
    states = []
    for number, weights in enumerate((stored, plain(stored, "weight_scale"))):
        folder = goldens.mllm_directory(tmp_path / str(number), weights=weights)
        states.append(plan_encoder(adapter, folder).build().state_dict())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def mark(**content: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def with_key(whole: Tensors, **others: torch.Tensor) -> Tensors:
    return whole | {KEY: whole[KEY].to(FP8)} | {beside(n): t for n, t in others.items()}


def test_a_mark_of_plain_fp8_is_understood(whole: Tensors, save: Callable) -> None:
    scale = torch.tensor(2.0)
    found = save(with_key(whole, weight_scale=scale, comfy_quant=mark(format="float8_e4m3fn")))
    assert torch.equal(found.file.read({"k": KEY})["k"], whole[KEY].to(FP8).float() * 2)


def with_int8_key(whole: Tensors, **others: torch.Tensor) -> Tensors:
    rounded = (whole[KEY] * 50).round().clamp(-127, 127).to(torch.int8)
    return whole | {KEY: rounded} | {beside(n): t for n, t in others.items()}


INT8 = {"format": "int8_tensorwise"}


@pytest.mark.parametrize("more", [{}, {"full_precision_matrix_mult": True}, {"convrot": False}])
def test_marked_int8_is_read_as_what_it_stands_for(
    whole: Tensors, save: Callable, more: dict[str, Any]
) -> None:
    for scale in (torch.tensor(0.5), torch.rand(len(whole[KEY]), 1)):
        tensors = with_int8_key(whole, weight_scale=scale, comfy_quant=mark(**INT8, **more))
        found = save(tensors)
        assert not found.ignored
        assert torch.equal(found.file.read({"k": KEY})["k"], tensors[KEY].float() * scale)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"weight_scale": torch.ones(())},
        {"comfy_quant": mark(**INT8)},
        {"comfy_quant": mark(**INT8), "weight_scale": torch.ones(3)},
        {"comfy_quant": mark(**INT8), "weight_scale": torch.ones(1, 32)},
        {"comfy_quant": mark(**INT8), "weight_scale": torch.ones((), dtype=torch.int8)},
        {"comfy_quant": mark(**INT8, convrot=True), "weight_scale": torch.ones(())},
        {"comfy_quant": mark(**INT8, params={"convrot": True}), "weight_scale": torch.ones(())},
        {"comfy_quant": mark(**INT8, group_size=16), "weight_scale": torch.ones(())},
        {"comfy_quant": mark(format="convrot_w4a4"), "weight_scale": torch.ones(())},
        {"comfy_quant": mark(format="float8_e4m3fn"), "weight_scale": torch.ones(())},
        {"comfy_quant": mark(format=["int8_tensorwise"]), "weight_scale": torch.ones(())},
        {"SCB": torch.ones(32)},
    ],
    ids=lambda others: " ".join(others) or "alone",
)
def test_int8_of_other_kinds_is_refused_with_the_way_out(
    whole: Tensors, save: Callable, others: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with goldens.refused(KEY, "is int8", "the precision int8 rounds full weights itself"):
        save(with_int8_key(whole, **others))
    name = "model.layers.0.mlp.up_proj."
    bare = goldens.bare_mllm(whole)
    bare[f"{name}weight"] = bare[f"{name}weight"].to(torch.int8)
    bare |= {name + n: t for n, t in others.items()}
    folder = goldens.mllm_directory(tmp_path / "mllm", weights=bare)
    adapter = save(goldens.without(whole, BODY))
    with goldens.refused(name, "the precision int8 rounds full weights itself"):
        plan_encoder(adapter, folder)


@pytest.mark.parametrize(
    "others",
    [
        {"comfy_quant": mark(format="mxfp8"), "weight_scale": torch.ones(())},
        {"comfy_quant": mark(format="float8_e5m2"), "weight_scale": torch.ones(())},
        {"comfy_quant": mark(format="float8_e4m3fn")},
        {"weight_scale": torch.ones(32, 3)},
        {"weight_scale": torch.ones((), dtype=torch.uint8)},
        {"weight_scale": torch.ones(()), "scale_weight": torch.ones(())},
        {"weight_scale_inv": torch.ones(())},
        {"weight_scale": torch.ones(()), "weight_scale_2": torch.ones(())},
        {"weight.absmax": torch.ones(3)},
        {"bias": torch.ones(32)},
        {"alpha": torch.ones(())},
    ],
    ids=" ".join,
)
def test_what_is_not_known_beside_a_weight_is_refused_by_name(
    whole: Tensors, save: Callable, others: dict[str, torch.Tensor]
) -> None:
    with goldens.refused(beside(sorted(others)[0]) if len(others) == 1 else beside("")):
        save(with_key(whole, **others))


def test_lora_of_another_layout_is_refused_by_name(whole: Tensors, save: Callable) -> None:
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"
    with goldens.refused(name):
        save(whole | {name: torch.ones(2, 2)})


def test_what_is_not_known_beside_a_weight_of_the_encoder_is_refused_by_name(
    whole: Tensors, plan: Callable
) -> None:
    for prefix in (f"{BODY}model.layers.0.mlp.up_proj.", "image_proj_model.proj.0."):
        with goldens.refused(prefix + "weight_scale_2"):
            plan(whole | {prefix + "weight_scale_2": torch.ones(())})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e39])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_scale_that_is_not_a_number_is_named(
    whole: Tensors, save: Callable, number: float, dtype: str
) -> None:
    scale = torch.ones(len(whole[KEY]), 1, dtype=torch.float64)
    scale[-1], scale[0] = number, -number
    with goldens.refused(beside("weight_scale"), "not numbers"):
        save(with_key(whole, weight_scale=scale.to(getattr(torch, dtype))))


def test_scales_are_no_tensors_of_their_own(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.ones(2), "x.scale_weight": torch.ones(1)}
    file = open_weight_file(goldens.write(tmp_path / "a", tensors))
    assert list(file.tensors) == list(file.scales) == ["x.weight"]
