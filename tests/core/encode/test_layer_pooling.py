"""Pools over the hidden states of many layers, against plain sums, and in the encoder."""

from __future__ import annotations

from collections.abc import Mapping

import goldens
import pytest
import torch
from goldens import TINY
from torch import nn

from easyref_core.adapter.layer_pooling import SHAPES, PoolSizes, new_sizes
from easyref_core.encode.chat_state import ChatState
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.layer_pooling import LayerPooling, Pooling, add_layer_pools
from easyref_core.errors import EasyRefError

TOKENS, STATES, WIDTH = 5, 6, TINY.hidden_size
SPANS = ((2, 6), (8, 12))
AGGREGATIONS = ("dla", "lap")


def random_pool(shape: str, heads: int = 2) -> LayerPooling:
    inner = {"attention": 64 * heads, "feed_forward": 24, "blocks": 2}
    sizes = PoolSizes(shape, **(inner if shape == "blocks" else {"attention": 64 * heads}))
    return goldens.randomise(LayerPooling(TINY, sizes, STATES, nn), 3).double()


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + TINY.rms_norm_eps).rsqrt() * weight


def attended(x: torch.Tensor, weights: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """x with the attention along its layers added: [T, M, D]."""
    y = normed(x, weights[prefix + "input_layernorm.weight"])
    q, k, v = (
        torch.einsum(
            "tmd,hcd->thmc", y, weights[f"{prefix}self_attn.{p}_proj.weight"].view(2, 64, -1)
        )
        for p in "qkv"
    )
    odds = torch.einsum("thmc,thnc->thmn", q, k).div(8).softmax(-1)
    mixed = torch.einsum("thmn,thnc->tmhc", odds, v).flatten(2)
    return x + torch.einsum("tmc,dc->tmd", mixed, weights[prefix + "self_attn.o_proj.weight"])


def blocks_by_hand(
    x: torch.Tensor, w: Mapping[str, torch.Tensor], factors: torch.Tensor
) -> torch.Tensor:
    for prefix in ("blocks.0.", "blocks.1."):
        x = attended(x, w, prefix)
        y = normed(x, w[prefix + "post_attention_layernorm.weight"])
        gate, up = (
            torch.einsum("tmd,fd->tmf", y, w[f"{prefix}mlp.{p}_proj.weight"])
            for p in ("gate", "up")
        )
        x = x + torch.einsum(
            "tmf,df->tmd", gate * gate.sigmoid() * up, w[prefix + "mlp.down_proj.weight"]
        )
    return torch.einsum("tmd,m->td", x, w["weighted_sum.weight"] * factors)


def scores_by_hand(
    x: torch.Tensor, w: Mapping[str, torch.Tensor], factors: torch.Tensor
) -> torch.Tensor:
    a = attended(x, w, "")
    odds = torch.einsum("tmd,d->tm", a, w["score.weight"][0]).softmax(-1) * factors
    pooled, last = torch.einsum("tm,tmd->td", odds, a), x[:, -1] * factors[-1]
    return (1 - w["gate.weight"]) * last + w["gate.weight"] * pooled


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_pool_is_what_plain_sums_give(shape: str, weighted: bool) -> None:
    pool = random_pool(shape)
    x = torch.randn(TOKENS, STATES, WIDTH, dtype=torch.float64)
    factors = torch.rand(STATES, dtype=torch.float64) if weighted else None
    by_hand = {"blocks": blocks_by_hand, "scores": scores_by_hand}[shape]
    wanted = by_hand(x, pool.state_dict(), torch.ones(STATES) if factors is None else factors)
    assert goldens.difference(pool(x, factors), wanted) <= 1e-12
    assert goldens.difference(wanted, x[:, -1]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_new_pool_gives_the_last_state_to_the_bit(shape: str, dtype: torch.dtype) -> None:
    pool = LayerPooling(TINY, new_sizes(shape, WIDTH), STATES, nn)
    pool.initialise()
    x = torch.randn(TOKENS, STATES, WIDTH).to(dtype)
    assert torch.equal(pool.to(dtype)(x), x[:, -1])
    assert torch.equal(pool(x, torch.ones(STATES)), x[:, -1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_of_training_reaches_a_new_pool(shape: str) -> None:
    pool = LayerPooling(TINY, new_sizes(shape, WIDTH), STATES, nn)
    pool.initialise()
    pool.requires_grad_(True)
    pool(torch.randn(TOKENS, STATES, WIDTH)).square().sum().backward()
    first = {"blocks": "weighted_sum.weight", "scores": "gate.weight"}[shape]
    assert dict(pool.named_parameters())[first].grad.abs().max() > 0


def pooled_encoder(
    aggregation: str, shape: str = "blocks", seed: int | None = None, **sizes: int
) -> EasyRefEncoder:
    """A tiny encoder with new pools, or random ones where there is a seed."""
    encoder = goldens.random_encoder(**sizes).requires_grad_(False)
    add_layer_pools(encoder, aggregation, shape)
    if seed is not None:
        goldens.randomise(encoder.mllm_layer_pooling, seed)
    return encoder.requires_grad_(False)


def chat(length: int = 14, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def hidden_states(encoder: EasyRefEncoder) -> torch.Tensor:
    """Of `chat()`: [M, L, D]."""
    sizes, length = encoder.mllm_layer_pooling.sizes, chat().shape[1]
    layers = len(encoder.mllm_final_layer.layers)
    state = ChatState(encoder.config, layers, new=[length], pooled=len(sizes.layers))
    (aggregation,) = sizes.aggregations
    encoder.reference_states(chat(), pooling=Pooling(aggregation, SPANS), chat=state)
    return state.parts[0].hidden


@pytest.mark.parametrize("before", [None, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_new_pools_start_as_the_plain_encoder_to_the_bit(
    aggregation: str, shape: str, dtype: torch.dtype, before: int | None
) -> None:
    encoder = pooled_encoder(aggregation, shape).to(dtype)
    embeds, pooling = chat().to(dtype), Pooling(aggregation, SPANS)
    plain = encoder.reference_states(embeds, before)
    assert torch.equal(encoder.reference_states(embeds, before, pooling=pooling), plain)
    assert torch.equal(
        encoder.reference_attention(embeds, before, pooling=pooling),
        encoder.reference_attention(embeds, before),
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_new_pools_start_as_the_plain_encoder_on_a_batch(aggregation: str) -> None:
    encoder = pooled_encoder(aggregation)
    embeds, poolings = [chat(14), chat(9)], [Pooling(aggregation, s) for s in (SPANS, ((3, 5),))]
    found = encoder.batch_reference_states(embeds, poolings)
    assert torch.equal(found, encoder.batch_reference_states(embeds))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_padded_batch_pools_as_each_group_alone(aggregation: str, shape: str) -> None:
    encoder = pooled_encoder(aggregation, shape, seed=1, final_layers=2)
    embeds, poolings = [chat(14), chat(9)], [Pooling(aggregation, s) for s in (SPANS, ((3, 5),))]
    rows = encoder.batch_reference_states(embeds, poolings)
    plain = encoder.batch_reference_states(embeds)
    for group, pooling, found in zip(embeds, poolings, rows, strict=True):
        alone = encoder.reference_states(group, pooling=pooling)
        assert goldens.difference(found[None], alone) <= 2e-5
    assert goldens.difference(rows, plain) > 0.1


def test_gradients_are_the_same_when_chunks_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("easyref_core.encode.layer_pooling.CHUNK_BYTES", 4 * 4 * WIDTH * 3)
    encoder, found = pooled_encoder("dla", seed=1), []
    encoder.mllm_layer_pooling.requires_grad_(True)
    for checkpointing in (False, True):
        encoder.zero_grad()
        encoder.gradient_checkpointing = checkpointing
        rows = encoder.batch_reference_states([chat()], [Pooling("dla", SPANS)])
        rows.square().sum().backward()
        found.append([p.grad.clone() for p in encoder.mllm_layer_pooling.parameters()])
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0])
    for first, second in zip(*found, strict=True):
        assert goldens.difference(first, second) <= 1e-5


def test_each_pool_reads_its_own_kind_of_token() -> None:
    encoder = pooled_encoder("dla", seed=1)
    pools, pooling = encoder.mllm_layer_pooling, Pooling("dla", SPANS)
    states = hidden_states(encoder)
    before = pools.pool(states, pooling)
    goldens.randomise(pools["image"], 9)
    moved = (pools.pool(states, pooling) - before).abs().amax(-1) > 0
    images = [any(first <= n < end for first, end in SPANS) for n in range(14)]
    assert moved.tolist() == images


def test_chunks_of_any_length_pool_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = pooled_encoder("dla", seed=1)
    states = hidden_states(encoder)
    whole = encoder.mllm_layer_pooling.pool(states, Pooling("dla", SPANS))
    monkeypatch.setattr("easyref_core.encode.layer_pooling.CHUNK_BYTES", 1)
    found = encoder.mllm_layer_pooling.pool(states, Pooling("dla", SPANS))
    assert goldens.difference(found, whole) <= 1e-5


def test_the_first_hidden_state_is_the_input_and_the_last_the_bodys_own() -> None:
    encoder = pooled_encoder("dla")
    states = hidden_states(encoder)
    assert states.shape == (TINY.num_layers, 14, WIDTH)
    assert torch.equal(states[0], encoder.multimodal_llm.model.norm(chat())[0])
    assert torch.equal(states[-1], goldens.body_states(encoder, chat())[0])


def test_chosen_hidden_states_are_the_ones_that_are_read() -> None:
    encoder = goldens.random_encoder().requires_grad_(False)
    add_layer_pools(encoder, "lap", layers=(1, 3))
    every = hidden_states(pooled_encoder("lap"))
    assert torch.equal(hidden_states(encoder), every[[1, 3]])


@pytest.mark.parametrize("layers", [(), (0, 2), (3, 1), (1, 1, 3), (0, 1, 2, 3, 4), (-1, 3)])
def test_hidden_states_that_cannot_be_read_are_refused(layers: tuple[int, ...]) -> None:
    encoder = goldens.random_encoder()
    with goldens.refused("must rise and end with 3"):
        add_layer_pools(encoder, "dla", layers=layers)
    assert encoder.mllm_layer_pooling is None


def test_pools_that_are_there_are_kept_when_others_come() -> None:
    encoder = pooled_encoder("dla", seed=1)
    before = {name: w.clone() for name, w in encoder.mllm_layer_pooling.state_dict().items()}
    add_layer_pools(encoder, "lap", "scores")
    after = encoder.mllm_layer_pooling
    assert after.sizes.aggregations == ("dla", "lap")
    assert all(torch.equal(after.state_dict()[name], weight) for name, weight in before.items())
    with pytest.raises(EasyRefError, match="reads the hidden states 0, 1, 2, 3, not 3"):
        add_layer_pools(encoder, "lap", layers=(3,))
