"""Numbers of config.json fit the weights, lie in their range, and belong to the tokens."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import TINY, Tensors

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.adapter.key_values import check_tokens
from easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.qwen2vl.config import MllmConfig
from easyref_core.qwen2vl.config_file import config_from_dict, is_qwen2_vl
from easyref_core.tokens.reference_tokens import ReferenceTokens

Edit = Callable[..., Path]
GOLDEN: dict[str, Any] = json.loads((goldens.MLLM / "config.json").read_text())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the golden MLLM directory."""
    return Path(shutil.copytree(goldens.MLLM, tmp_path / "mllm"))


@pytest.fixture
def edit(directory: Path) -> Edit:
    """Set a number of the golden MLLM's config.json; `vision.NAME` for one of the vision tower."""

    def change(key: str, value: Any, **others: Any) -> Path:
        content = json.loads(json.dumps(GOLDEN)) | others
        section = content["vision_config"] if key.startswith("vision.") else content
        section[key.removeprefix("vision.")] = value
        (directory / "config.json").write_text(json.dumps(content))
        return directory

    return change


NUMBERS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "vision.embed_dim",
    "vision.depth",
    "vision.num_heads",
    "vision.mlp_ratio",
    "vision.hidden_size",
    "vision.patch_size",
    "vision.spatial_merge_size",
    "vision.temporal_patch_size",
    "vision.in_chans",
]
WRONG = [
    True,
    "64",
    [64],
    {"a": 1},
    -1,
    0,
    1e400,
    float("nan"),
    10**400,
    10**12,
    1e-300,
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:8])
def test_a_number_of_another_type_or_range_is_refused_at_once(
    adapter_only: AdapterCheckpoint, edit: Edit, key: str, value: Any
) -> None:
    start = time.monotonic()
    with goldens.refused(edit(key, value) / "config.json", key.split(".")[-1]):
        plan_encoder(adapter_only, edit(key, value))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("value", [True, "a", [1], 3])
@pytest.mark.parametrize(
    "key", ["vision_config", "text_config", "rope_scaling", "rope_parameters", "layer_types"]
)
def test_a_section_of_another_type_is_refused(
    adapter_only: AdapterCheckpoint, edit: Edit, key: str, value: Any
) -> None:
    if key == "layer_types" and value == [1]:
        value = ["full_attention", "sliding_attention"]
    with goldens.refused(key):
        plan_encoder(adapter_only, edit(key, value))


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 5, 1000, 1001, 10**9])
def test_another_number_of_layers_than_the_weights_have_is_refused_at_once(
    adapter_only: AdapterCheckpoint, checkpoint: AdapterCheckpoint, edit: Edit, layers: int
) -> None:
    start = time.monotonic()
    for found in (adapter_only, checkpoint):
        with pytest.raises(EasyRefError, match=r"layers' weights are missing|num_hidden_layers"):
            plan_encoder(found, edit("num_hidden_layers", layers))
    (edit("num_hidden_layers", layers) / "model.safetensors").unlink()
    with pytest.raises(EasyRefError, match=r"weights are missing|num_hidden_layers"):
        plan_encoder(checkpoint, edit("num_hidden_layers", layers))
    with pytest.raises(EasyRefError, match=r"weights are missing|depth"):
        plan_encoder(checkpoint, edit("vision.depth", layers + (layers == 2)))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 32),
        ("intermediate_size", 64),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", 1),
        ("num_attention_heads", 8),
        ("vocab_size", 447),
        ("vision.depth", 1),
        ("vision.embed_dim", 64),
        ("vision.mlp_ratio", 4),
        ("vision.hidden_size", 32),
        ("vision.patch_size", 7),
        ("vision.spatial_merge_size", 1),
        ("vision.temporal_patch_size", 1),
        ("vision.in_chans", 1),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 3),
        ("vision.num_heads", 3),
        ("vision.num_heads", 32),
        ("head_dim", 32),
        ("hidden_act", "gelu"),
        ("vision.hidden_act", "silu"),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10_000.0}),
    ],
)
def test_a_number_that_does_not_fit_the_weights_or_each_other_is_refused(
    adapter_only: AdapterCheckpoint, edit: Edit, key: str, value: Any
) -> None:
    with goldens.refused("."):
        plan_encoder(adapter_only, edit(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 10_000.0),
        ("rms_norm_eps", 1e-5),
        ("num_attention_heads", 2),
        ("vision.num_heads", 1),
    ],
)
def test_a_number_that_no_weight_tells_is_part_of_the_tokens_identity(
    adapter_only: AdapterCheckpoint, edit: Edit, key: str, value: Any
) -> None:
    # Two heads share one of twice the width: the weights' shapes are the same.
    others = {"num_key_value_heads": 1} if key == "num_attention_heads" else {}
    right = plan_encoder(adapter_only, goldens.MLLM)
    other = plan_encoder(adapter_only, edit(key, value, **others))
    assert {n: t.shape for n, t in other.build().state_dict().items()} == {
        n: t.shape for n, t in right.build().state_dict().items()
    }
    assert other.identity != right.identity
    assert right.identity == plan_encoder(adapter_only, goldens.MLLM).identity
    used = replace(adapter_only, mllm_mark=right.config.mark)
    tokens = torch.zeros(1, used.num_tokens, used.token_width)
    for identity in (right.identity, adapter_only.identity):  # the second is of older files
        check_tokens(used, ReferenceTokens(tokens, tokens, identity))
    with goldens.refused("with an MLLM of another config.json", other.identity):
        check_tokens(used, ReferenceTokens(tokens, tokens, other.identity))


def test_released_models_have_the_adapters_plain_identity(tmp_path: Path) -> None:
    assert MllmConfig().mark == ""
    shapes = {n: list(s) for n, s in goldens.real_shapes(lora=False).items()}
    found = load_checkpoint(goldens.sparse_file(tmp_path / "released.safetensors", shapes))
    assert plan_encoder(found).identity == found.identity
    assert found.made(found.identity)
    assert not found.made(f"{found.identity}-{TINY.mark or '01234567'}")


def test_numbers_are_read_flat_and_nested() -> None:
    text = {k: v for k, v in GOLDEN.items() if k not in ("model_type", "vision_config")}
    rope = {"rope_theta": text.pop("rope_theta"), "rope_type": "default", "type": "mrope"}
    nested = {
        "model_type": "qwen2_vl",
        "text_config": text | {"rope_parameters": rope, "layer_types": ["full_attention"] * 4},
        "vision_config": GOLDEN["vision_config"] | {"rope_parameters": {"rope_theta": 10_000.0}},
    }
    wanted = config_from_dict(GOLDEN, "flat")
    assert config_from_dict(nested, "nested") == wanted
    assert (wanted.num_layers, wanted.num_heads, wanted.rope_theta) == (4, 4, 1e6)
    assert config_from_dict({**GOLDEN, "hidden_size": 64.0}, "a float") == wanted


def test_names_are_shown_without_control_characters(tmp_path: Path) -> None:
    with goldens.refused("a\\x1b[2J/config.json", "'b\\x1b[2J'"):
        config_from_dict({"model_type": "b\x1b[2J"}, "a\x1b[2J/config.json")


def test_another_model_is_told_apart_without_raising(directory: Path, edit: Edit) -> None:
    assert is_qwen2_vl(directory)
    assert not is_qwen2_vl(edit("model_type", "qwen2_5_vl"))
    assert not is_qwen2_vl(directory / "nowhere")


def test_layers_that_an_adapter_carries_are_not_dropped(
    whole: Tensors, plan: Callable[..., EncoderPlan], tmp_path: Path
) -> None:
    smaller = goldens.mllm_directory(tmp_path / "smaller", replace(TINY, num_layers=3))
    with goldens.refused("carries 3 layers", "only 2 are used", smaller / "config.json"):
        plan(whole, smaller)
