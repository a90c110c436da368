"""Layer pooling in an adapter's file is recognised by its names and shapes, or refused by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import goldens
import pytest
import torch
from goldens import Tensors

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.adapter.layer_pooling import LAYERS_KEY, POOLING, SHAPES
from easyref_core.encode.layer_pooling import add_layer_pools
from easyref_core.encode.plan_encoder import plan_encoder

IMAGE = POOLING + "image."
Q = "blocks.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pooled() -> Tensors:
    """A whole adapter with new pools for dla."""
    return adapter_with("dla")


def adapter_with(
    *aggregations: str, shape: str = "blocks", layers: tuple[int, ...] | None = None
) -> Tensors:
    encoder = goldens.random_encoder()
    for aggregation in aggregations:
        add_layer_pools(encoder, aggregation, shape, layers)
    return goldens.random_adapter(encoder, rank=4)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., AdapterCheckpoint]:
    def save(tensors: Tensors, **metadata: str) -> AdapterCheckpoint:
        return load_checkpoint(goldens.write(tmp_path / "pooled.safetensors", tensors, **metadata))

    return save


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aggregations", [("dla",), ("lap",), ("dla", "lap")])
def test_pools_are_recognised_and_built_as_they_were(
    saved: Callable, aggregations: tuple[str, ...], shape: str
) -> None:
    tensors = adapter_with(*aggregations, shape=shape)
    found = saved(tensors)
    assert found.aggregations == aggregations
    assert found.report()["layer_pooling"] == [f"{name} ({shape})" for name in aggregations]
    state = plan_encoder(found).build().state_dict()
    own = {name: t for name, t in tensors.items() if name.startswith(POOLING)}
    assert own
    assert all(torch.equal(state[name], t) for name, t in own.items())


def test_an_adapter_keeps_its_identity_with_pools_inside(
    saved: Callable, whole: Tensors, pooled: Tensors
) -> None:
    assert saved(whole).identity == saved(pooled).identity
    assert saved(whole).aggregations == ()


def test_hidden_states_that_are_read_come_from_the_metadata(saved: Callable) -> None:
    tensors = adapter_with("dla", layers=(0, 2, 3))
    found = saved(tensors, **{LAYERS_KEY: "0,2,3"})
    assert found.mllm_layers == (0, 2, 3)
    assert found.report()["mllm_layers"] == [0, 2, 3]
    assert plan_encoder(found).pooling.layers == (0, 2, 3)
    assert plan_encoder(found).pooling.metadata == {LAYERS_KEY: "0,2,3"}
    with goldens.refused("weighted_sum.weight", "[3]", "[4]"):
        plan_encoder(saved(tensors))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0,1",
        "0,1,2,x",
        pytest.param("0,1,2,3" + " " * 8000 + ",x", id="long"),
        "3,2,1,0",
        "0,1,1,3",
        "-1,0,1,3",
        "0,1,2,99999",
        "\x1b[31m",
    ],
)
def test_metadata_that_does_not_fit_is_refused(saved: Callable, pooled: Tensors, text: str) -> None:
    with goldens.refused("pooled.safetensors"):
        plan_encoder(saved(pooled, **{LAYERS_KEY: text}))


def test_pools_in_scaled_fp8_are_multiplied_out(saved: Callable) -> None:
    encoder = goldens.random_encoder()
    add_layer_pools(encoder, "dla")
    goldens.randomise(encoder.mllm_layer_pooling)
    tensors = goldens.random_adapter(encoder)
    scaled = dict(tensors)
    for name, weight in tensors.items():
        if name.startswith(POOLING) and weight.ndim == 2:
            factor = weight.abs().max() / 448
            scaled[name] = (weight / factor).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = factor
    state = plan_encoder(saved(scaled)).build().state_dict()
    for name in (IMAGE + Q, IMAGE + "weighted_sum.weight"):
        assert (
            0 <= goldens.difference(state[name], tensors[name]) < 0.07 * tensors[name].abs().max()
        )


def test_pools_of_a_larger_mllm_are_refused(saved: Callable) -> None:
    tensors = adapter_with("dla", shape="scores")
    with goldens.refused("0, 1, 2, 5", "end with 3"):
        plan_encoder(saved(tensors, **{LAYERS_KEY: "0,1,2,5"}))


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        (IMAGE, "lacks mllm_layer_pooling.image."),
        (IMAGE + "blocks.1.mlp.up_proj", IMAGE + "blocks.1.mlp.up_proj.weight"),
        (IMAGE + "weighted_sum", IMAGE + "weighted_sum.weight"),
        (IMAGE + "blocks.0.", IMAGE + "blocks.0.input_layernorm.weight"),
        (IMAGE + Q, IMAGE + "blocks.0.self_attn"),
    ],
)
def test_partial_pools_name_what_is_missing(
    saved: Callable, pooled: Tensors, left_out: str, said: str
) -> None:
    with goldens.refused(said):
        saved(goldens.without(pooled, left_out))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("sound.weight", (3,), "a layer pool 'sound'"),
        ("text.blocks.0.bias", (3,), "text.blocks.0.bias"),
        ("text.blocks.7.input_layernorm.weight", (128,), "text.blocks."),
        (f"text.{Q}", (64,), "[64]"),
        (f"text.{Q}", (), "is needed"),
        (f"text.{Q}", (96, 128), "heads of 64"),
        (f"text.{Q}", (100_000, 128), "100000"),
        (f"text.{Q}", (0, 128), "heads of 64"),
        ("text.blocks.0.mlp.up_proj.weight", (64, 64), "[64, 64]"),
        ("text.weighted_sum.weight", (5,), "4 and 5 hidden states"),
        ("text.weighted_sum.weight", (4, 1), "[4, 1]"),
    ],
)
def test_pools_of_other_shapes_are_refused(
    saved: Callable, pooled: Tensors, name: str, shape: tuple[int, ...], said: str
) -> None:
    with goldens.refused(said):
        saved(pooled | {POOLING + name: torch.zeros(shape)})


def test_many_blocks_are_refused_before_they_are_built(saved: Callable, pooled: Tensors) -> None:
    many = {
        name.replace("blocks.1.", f"blocks.{n}."): weight.clone()
        for name, weight in pooled.items()
        if name.startswith(f"{POOLING}text.blocks.1.")
        for n in range(2, 40)
    }
    with goldens.refused("40 blocks"):
        saved(pooled | many)
