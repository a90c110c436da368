"""Adapters that lack parts, mix parts or hold numbers that are none name the weight at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import goldens
import pytest
import torch
from goldens import BODY, Tensors

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.key_values import lora_weights, project_tokens
from easyref_core.encode.group import Reference
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

LAYER = next(iter(goldens.LAYERS))


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("image_proj_model.", "image_proj_model.proj.0.bias"),
        ("mllm_final_layer.", "mllm_final_layer.reference_tokens"),
        ("_ip.", "lacks unet.*.to_k_ip"),
        ("reference_tokens", "mllm_final_layer.reference_tokens"),
        ("proj.3.bias", "image_proj_model.proj.3.bias"),
        (f"{LAYER}.processor.to_v_ip", f"unet.{LAYER}.processor.to_v_ip.weight"),
        (f"{LAYER}.processor.to_q_lora.up", f"unet.{LAYER}.processor.to_q_lora.up.weight"),
    ],
)
def test_partial_adapter_names_what_is_missing(
    whole: Tensors, plan: Callable, left_out: str, said: str
) -> None:
    with goldens.refused("adapter.safetensors", said):
        plan(goldens.without(whole, left_out))


def test_partial_mllm_names_what_is_missing(whole: Tensors, plan: Callable, tmp_path: Path) -> None:
    name = BODY + "model.layers.1.mlp.up_proj.weight"
    with goldens.refused("1 weights are missing", name, "Qwen2-VL-2B-Instruct directory"):
        plan(goldens.without(whole, name))
    norm = BODY + "model.norm.weight"
    with goldens.refused("only part of the MLLM", norm):
        plan(goldens.without(whole, norm))
    with goldens.refused("1 weights are missing", name):
        plan(goldens.without(whole, name), goldens.mllm_directory(tmp_path / "no_weights"))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("mllm_final_layer.reference_tokens", (16, 100), ("[16, 100]", "128")),
        ("mllm_final_layer.reference_tokens", (16,), ("[16]", "matrix")),
        ("image_proj_model.proj.0.weight", (), ("[]", "matrix")),
        ("image_proj_model.proj.2.weight", (50, 128), (LAYER, "48", "50")),
        ("image_proj_model.proj.3.bias", (), ("[]", "[48]")),
        (f"unet.{LAYER}.processor.to_k_ip.weight", (32, 96), (LAYER, "[32, 96]", "48")),
        (f"unet.{LAYER}.processor.to_v_ip.weight", (32,), ("[32]", "matrix")),
        (f"unet.{LAYER}.processor.to_q_lora.down.weight", (8, 32), ("ranks 4, 8",)),
        (f"unet.{LAYER}.processor.to_q_lora.down.weight", (), ("[]", "matrix")),
        (BODY + "visual.patch_embed.proj.weight", (80,), ("[80]", "damaged")),
        (BODY + "model.layers.1.mlp.up_proj.weight", (96, 64), ("[96, 64]", "[96, 128]")),
    ],
)
def test_mixed_or_misshapen_adapter_names_both_sides(
    whole: Tensors, plan: Callable, name: str, shape: tuple[int, ...], said: tuple[str, ...]
) -> None:
    with goldens.refused(*said):
        plan(whole | {name: torch.zeros(shape)})


def test_misshapen_patch_embedding_with_a_directory(
    whole: Tensors, plan: Callable, tmp_path: Path
) -> None:
    name = BODY + "visual.patch_embed.proj.weight"
    with goldens.refused(name, "[]", "[80, 3, 2, 14, 14]"):
        plan(whole | {name: torch.zeros(())}, goldens.mllm_directory(tmp_path / "mllm"))


@pytest.mark.parametrize(
    "name",
    [
        BODY + "model.layers.1.mlp.down_proj.weight",
        BODY + "visual.merger.ln_q.bias",
        "mllm_final_layer.reference_tokens",
        "image_proj_model.proj.2.weight",
    ],
)
def test_nan_in_the_encoder_is_named(
    whole: Tensors, plan: Callable, tokenizer: PromptTokenizer, name: str
) -> None:
    damaged = whole[name].clone()
    damaged.view(-1)[3] = float("nan")
    encoder = plan(whole | {name: damaged}).build()
    reference = Reference(goldens.pictures("one_ref_prompt")[0])
    with goldens.refused(name, "not numbers"):
        goldens.encode(encoder, tokenizer, [reference], "", image_size=84)


@pytest.mark.parametrize("part", ["to_k_ip", "to_v_ip"])
def test_nan_in_key_or_value_projections_is_named(
    whole: Tensors, tmp_path: Path, part: str
) -> None:
    layer = list(goldens.LAYERS)[1]
    name = f"unet.{layer}.processor.{part}.weight"
    damaged = whole[name].clone()
    damaged[5, 5] = float("inf")
    found = load_checkpoint(goldens.write(tmp_path / "bad.safetensors", whole | {name: damaged}))
    cond = torch.ones(1, 16, goldens.TOKEN_WIDTH)
    with goldens.refused(layer, part, "bad.safetensors", "float32"):
        project_tokens(found, ReferenceTokens(cond, cond, found.identity))


def test_nan_in_lora_is_named(whole: Tensors, tmp_path: Path) -> None:
    name = f"unet.{LAYER}.processor.to_out_lora.up.weight"
    damaged = torch.full_like(whole[name], float("nan"))
    found = load_checkpoint(goldens.write(tmp_path / "bad.safetensors", whole | {name: damaged}))
    with goldens.refused("bad.safetensors", name, "not numbers"):
        lora_weights(found)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_changed_since_it_was_opened_is_refused(
    whole: Tensors, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"adapter.{suffix}"

    def put(tensors: Tensors) -> None:
        if suffix == "pt":
            torch.save(tensors, path)
        else:
            goldens.write(path, tensors)

    put(whole)
    found = load_checkpoint(path)
    plan = plan_encoder(found)
    put(goldens.without(whole, "_lora"))
    for action in (plan.build, lambda: lora_weights(found), lambda: found.identity):
        with goldens.refused(path, "has changed since it was loaded"):
            action()
    path.unlink()
    with goldens.refused("There is no weight file", path):
        plan.build()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mllm_final_layer.reference_tokens": torch.zeros(0, 128)}, "[0, 128]"),
        ({"mllm_final_layer.reference_tokens": torch.zeros(5000, 128)}, "5,000 reference tokens"),
        ({"image_proj_model.proj.0.bias": torch.zeros(20_000)}, "[20000]"),
        ({"module.image_proj_model.proj.0.bias": torch.zeros(128)}, "twice"),
        ({f"unet.{LAYER}.processor.to_k_ip.weight": torch.zeros(0, 48)}, "[0, 48]"),
    ],
)
def test_sizes_that_no_adapter_has_are_refused(
    whole: Tensors, save: Callable, changed: Tensors, said: str
) -> None:
    with goldens.refused("changed.safetensors", said):
        save(whole | changed)


@pytest.mark.parametrize(
    "name",
    [
        "mllm_final_layer.norm.weight",
        "image_proj_model.proj.2.weight",
        f"unet.{LAYER}.processor.to_v_ip.weight",
        f"unet.{LAYER}.processor.to_k_lora.up.weight",
        BODY + "model.layers.1.mlp.down_proj.weight",
    ],
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_whole_numbers_are_refused(
    whole: Tensors, save: Callable, name: str, dtype: torch.dtype
) -> None:
    with goldens.refused(name, str(dtype).removeprefix("torch."), "changed.safetensors"):
        save(whole | {name: whole[name].to(dtype)})


def test_whole_numbers_in_the_mllms_folder_are_refused(
    whole: Tensors, save: Callable, tmp_path: Path
) -> None:
    body = goldens.bare_mllm(whole)
    name = "model.layers.0.mlp.up_proj.weight"
    body[name] = body[name].to(torch.int8)
    folder = goldens.mllm_directory(tmp_path / "mllm", weights=body)
    with goldens.refused(name, "int8", folder):
        plan_encoder(save(goldens.without(whole, BODY)), folder)
