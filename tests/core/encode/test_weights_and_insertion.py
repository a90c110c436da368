"""What a reference's weight does, and where the reference tokens enter.

The last layer is written out here a second time, step by step, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import goldens
import pytest
import torch
from goldens import CASES

from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.plan_encoder import EncoderPlan
from easyref_core.pictures.preprocessing import preprocess
from easyref_core.qwen2vl.decoder import rope
from easyref_core.qwen2vl.prompt import PromptTokenizer, TokenizedPrompt
from easyref_core.tokens.reference_tokens import ReferenceTokens
from easyref_core.untrusted import shown

CPU = torch.device("cpu")
FOUR = "four_refs_prompt"


@torch.no_grad()
def embed_case(
    encoder: EasyRefEncoder, tokenizer: PromptTokenizer, case: str = FOUR
) -> tuple[torch.Tensor, TokenizedPrompt]:
    """The language model's input for a golden case, and its chat."""
    patches = [preprocess(p, goldens.IMAGE_SIZE) for p in goldens.pictures(case)]
    plan = tokenizer.tokenize([p.num_tokens for p in patches], goldens.user_prompt(case))
    return encoder.embed(plan, encoder.encode_images(patches, CPU), CPU), plan


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """[L, heads, dim]: each pair (i, i + dim/2) turned by position / theta ** (2 i / dim)."""
    length, _, dim = x.shape
    powers = torch.arange(0, dim, 2).double() / dim
    angles = torch.arange(length).double()[:, None] / theta**powers
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@torch.no_grad()
def by_hand(
    encoder: EasyRefEncoder, states: torch.Tensor, odds: torch.Tensor | None = None
) -> torch.Tensor:
    """The final layer's reference rows in double precision, all rows computed.

    `odds` [L] multiply each column's share of attention before it is normalised; columns of
    odds 0 are taken out altogether.
    """
    config, final = encoder.config, encoder.mllm_final_layer
    layer, eps = final.layers[0], encoder.config.rms_norm_eps
    x = torch.cat((states[0], final.reference_tokens)).double()
    count, length = encoder.num_tokens, x.shape[0]
    odds = torch.ones(length - count) if odds is None else odds
    odds = torch.cat((odds, torch.ones(count))).double()

    def linear(module: torch.nn.Linear, value: torch.Tensor) -> torch.Tensor:
        bias = 0 if module.bias is None else module.bias.double()
        return value @ module.weight.double().T + bias

    h = rms(x, layer.input_layernorm.weight, eps)
    attention = layer.self_attn
    q = linear(attention.q_proj, h).view(length, config.num_heads, -1)
    k = linear(attention.k_proj, h).view(length, config.num_kv_heads, -1)
    v = linear(attention.v_proj, h).view(length, config.num_kv_heads, -1)
    q, k = rotated(q, config.rope_theta), rotated(k, config.rope_theta)
    kept = odds.nonzero()[:, 0]
    rows = []
    for row in range(length - count, length):
        columns = kept[kept <= row]
        heads = []
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            logits = k[columns, group] @ q[row, head] / config.head_dim**0.5
            share = logits.exp() * odds[columns]
            heads.append(share @ v[columns, group] / share.sum())
        rows.append(torch.cat(heads))
    y = x[length - count :] + linear(attention.o_proj, torch.stack(rows))
    h = rms(y, layer.post_attention_layernorm.weight, eps)
    gate = linear(layer.mlp.gate_proj, h)
    y = y + linear(layer.mlp.down_proj, gate * gate.sigmoid() * linear(layer.mlp.up_proj, h))
    return rms(y, final.norm.weight, eps)[None]


def columns(plan: TokenizedPrompt, weights: Sequence[float]) -> torch.Tensor:
    odds = torch.ones(len(plan))
    for (first, end), weight in zip(plan.image_spans, weights, strict=True):
        odds[first:end] = weight
    return odds


@pytest.fixture
def encode(encoder: EasyRefEncoder, tokenizer: PromptTokenizer) -> Callable[..., ReferenceTokens]:
    """Encode the golden case of four references with these weights."""

    def run(weights: Sequence[float] = (1, 1, 1, 1), **options: Any) -> ReferenceTokens:
        references = [
            replace(r, weight=w) for r, w in zip(goldens.references(FOUR), weights, strict=True)
        ]
        return goldens.encode(
            options.pop("encoder", encoder),
            tokenizer,
            references,
            goldens.user_prompt(FOUR),
            image_size=goldens.IMAGE_SIZE,
            **options,
        )

    return run


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_reference_rows_equal_a_whole_final_layer(
    encoder: EasyRefEncoder, tokenizer: PromptTokenizer, case: str
) -> None:
    """Computing the last rows alone changes nothing."""
    embeds, _ = embed_case(encoder, tokenizer, case)
    states, final = goldens.body_states(encoder, embeds), encoder.mllm_final_layer
    found = encoder.reference_states(embeds)
    assert goldens.difference(found, by_hand(encoder, states).float()) <= 2e-5
    x = torch.cat((states, final.reference_tokens[None]), dim=1)
    position = rope(encoder.config, x.shape[1], CPU, torch.float32)
    rows = final.norm(final.layers[0](x, position))[:, -encoder.num_tokens :]
    assert goldens.difference(found, rows) <= 2e-5


def test_weights_of_one_change_no_bit(encode: Callable, encoder: EasyRefEncoder) -> None:
    golden = goldens.expected()[f"full.{FOUR}.tokens"]
    assert torch.equal(encode((1, 1.0, 1, 1)).cond, encode().cond)
    assert goldens.difference(encode().cond, golden) <= 1e-4


@pytest.mark.parametrize(
    "weights",
    [(0, 1, 1, 1), (1, 0, 0, 1), (0, 0, 0, 0), (2, 1, 1, 1), (0.5, 1, 3, 0), (1e-3, 1, 1, 1e3)],
)
@torch.no_grad()
def test_weight_multiplies_the_odds_of_attention(
    encode: Callable, encoder: EasyRefEncoder, tokenizer: PromptTokenizer, weights: Any
) -> None:
    embeds, plan = embed_case(encoder, tokenizer)
    rows = by_hand(encoder, goldens.body_states(encoder, embeds), columns(plan, weights))
    wanted = encoder.project(rows.float())
    found = encode(weights)
    assert goldens.difference(found.cond, wanted) <= 5e-5
    assert goldens.difference(found.cond, encode().cond) > 1e-3
    assert torch.equal(found.uncond, encode().uncond)


@pytest.mark.parametrize("weight", [-1.0, -1e-9, float("nan"), float("inf"), "1", None, True])
def test_impossible_weight_is_refused(weight: Any) -> None:
    with goldens.refused("reference 2", f"the weight is {shown(weight)}", "0 or more"):
        replace(goldens.references(FOUR)[1], weight=weight, name="reference 2")


@torch.no_grad()
def by_layers(
    encoder: EasyRefEncoder, embeds: torch.Tensor, before: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """All layers in a row over all rows; the tokens enter before the last `before` of them.

    `bias` is added to the attention of the last one.
    """
    body, final = encoder.multimodal_llm.model, encoder.mllm_final_layer
    layers = [*body.layers, *final.layers]
    length = embeds.shape[1] + encoder.num_tokens
    position = rope(encoder.config, length, CPU, torch.float32)
    x = embeds
    for number, layer in enumerate(layers):
        if number == len(body.layers):
            x = body.norm(x)
        if number == len(layers) - before:
            x = torch.cat((x, final.reference_tokens[None]), dim=1)
        x = layer(x, position, bias=bias if number == len(layers) - 1 else None)
    return final.norm(x)[:, -encoder.num_tokens :]


@pytest.mark.parametrize("before", [1, 2, 3])
@torch.no_grad()
def test_tokens_enter_before_the_last_layers(
    encode: Callable, encoder: EasyRefEncoder, tokenizer: PromptTokenizer, before: int
) -> None:
    embeds, _ = embed_case(encoder, tokenizer)
    wanted = encoder.project(by_layers(encoder, embeds, before))
    found = encode(insert_before=before)
    assert goldens.difference(found.cond, wanted) <= 5e-5
    assert (goldens.difference(found.cond, encode().cond) > 0.05) == (before > 1)


def test_before_the_last_layer_is_the_default(encode: Callable) -> None:
    assert torch.equal(encode(insert_before=1).cond, encode().cond)


@pytest.mark.parametrize("before", [2, 3])
@torch.no_grad()
def test_states_before_the_tokens_are_unaffected(
    encoder: EasyRefEncoder, tokenizer: PromptTokenizer, before: int
) -> None:
    embeds, _ = embed_case(encoder, tokenizer)
    norm, caught = encoder.multimodal_llm.model.norm, []
    hook = norm.register_forward_hook(lambda _, __, out: caught.append(out))
    try:
        encoder.reference_states(embeds, insert_before=before)
        alone = goldens.body_states(encoder, embeds)
    finally:
        hook.remove()
    assert caught[0].shape[1] == embeds.shape[1] + encoder.num_tokens
    assert goldens.difference(caught[0][:, : embeds.shape[1]], alone) <= 1e-5


@pytest.mark.parametrize("before", [0, -1, 4])
def test_impossible_insertion_is_refused(encode: Callable, before: int) -> None:
    with goldens.refused(f"last {before} layers", "1 to 3"):
        encode(insert_before=before)


def test_insertion_is_limited_by_the_layers_there_are(encode: Callable) -> None:
    small = goldens.random_encoder(num_layers=2)
    assert torch.isfinite(encode(encoder=small, insert_before=2).cond).all()
    with goldens.refused("last 3 layers", "1 to 2"):
        encode(encoder=small, insert_before=3)


@pytest.fixture
def two_layers(plan: Callable[..., EncoderPlan]) -> EasyRefEncoder:
    """From an adapter file with two final layers."""
    made = plan(goldens.random_adapter(goldens.random_encoder(final_layers=2)))
    assert made.checkpoint.report()["final_layers"] == 2
    assert made.config.num_layers == goldens.TINY.num_layers
    return made.build()


def test_two_final_layers_are_entered_before_the_first(
    encode: Callable, two_layers: EasyRefEncoder
) -> None:
    default = encode(encoder=two_layers)
    assert torch.equal(default.cond, encode(encoder=two_layers, insert_before=2).cond)
    assert goldens.difference(default.cond, encode(encoder=two_layers, insert_before=1).cond) > 1e-3


@pytest.mark.parametrize("before", [1, 2, 3])
@torch.no_grad()
def test_two_final_layers_can_be_entered_anywhere(
    encode: Callable, two_layers: EasyRefEncoder, tokenizer: PromptTokenizer, before: int
) -> None:
    embeds, _ = embed_case(two_layers, tokenizer)
    wanted = two_layers.project(by_layers(two_layers, embeds, before))
    found = encode(encoder=two_layers, insert_before=before)
    assert goldens.difference(found.cond, wanted) <= 5e-5


@torch.no_grad()
def test_weights_act_in_the_very_last_layer_only(
    encode: Callable, two_layers: EasyRefEncoder, tokenizer: PromptTokenizer
) -> None:
    embeds, plan = embed_case(two_layers, tokenizer)
    weights = (0.2, 1, 5, 1)
    odds = torch.cat((columns(plan, weights), torch.ones(two_layers.num_tokens)))
    wanted = two_layers.project(by_layers(two_layers, embeds, 2, odds.log()))
    found = encode(weights, encoder=two_layers)
    assert goldens.difference(found.cond, wanted) <= 5e-5
    assert goldens.difference(found.cond, encode(encoder=two_layers).cond) > 1e-3
