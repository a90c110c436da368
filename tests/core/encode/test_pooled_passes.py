"""Groups whose layers are pooled: what they give, what is kept of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import goldens
import pytest
import torch
from PIL import Image

from easyref_core.adapter.layer_pooling import POOLS
from easyref_core.encode.cache import EncodingCache
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import Reference
from easyref_core.encode.inspection import inspect_references
from easyref_core.encode.layer_pooling import add_layer_pools
from easyref_core.encode.mllm_layers import MllmLayerWeights
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

GROUP = [Reference(Image.new("RGB", (90, 60), colour), name=colour) for colour in ("red", "blue")]
OTHERS = [Reference(Image.new("RGB", (60, 90), "green"), name="green")]
EARLY = MllmLayerWeights("early")
Encode = Callable[..., ReferenceTokens]


def pooled_encoder(*aggregations: str, seed: int | None = 1) -> EasyRefEncoder:
    encoder = goldens.random_encoder()
    for aggregation in aggregations:
        add_layer_pools(encoder, aggregation)
    if seed is not None:
        goldens.randomise(encoder.mllm_layer_pooling, seed)
    return encoder.requires_grad_(False)


@pytest.fixture(scope="module")
def pooled() -> EasyRefEncoder:
    return pooled_encoder("dla", "lap")


@pytest.fixture
def encode(pooled: EasyRefEncoder, tokenizer: PromptTokenizer) -> Encode:
    def run(group: list[Reference] = GROUP, **options: Any) -> ReferenceTokens:
        encoder = options.pop("encoder", pooled)
        settings = {"image_size": goldens.IMAGE_SIZE, "aggregation": "dla"} | options
        return goldens.encode(
            encoder, tokenizer, group, settings.pop("prompt", "a boat"), **settings
        )

    return run


class Calls:
    """Counts the calls of modules."""

    def __init__(self, modules: Any) -> None:
        self.number = 0
        for module in modules:
            module.register_forward_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.number += 1


@pytest.mark.parametrize("aggregation", POOLS)
def test_new_pools_give_the_tokens_of_the_plain_encoder_to_the_bit(
    encode: Encode, aggregation: str
) -> None:
    encoder = pooled_encoder("dla", "lap", seed=None)
    found, plain = (encode(encoder=encoder, aggregation=a) for a in (aggregation, "easyref"))
    assert torch.equal(found.cond, plain.cond)
    assert torch.equal(found.uncond, plain.uncond)
    assert (found.aggregation, found.adapter) == (aggregation, plain.adapter)


def test_trained_pools_give_other_tokens_in_both_branches(encode: Encode) -> None:
    dla, lap, plain = (encode(aggregation=a) for a in ("dla", "lap", "easyref"))
    for first, second in ((dla, plain), (lap, plain), (dla, lap)):
        assert goldens.difference(first.cond, second.cond) > 0.01
        assert goldens.difference(first.uncond, second.uncond) > 0.01


def test_even_weights_change_nothing_to_the_bit(encode: Encode) -> None:
    found, plain = encode(mllm_layers=MllmLayerWeights()), encode()
    assert torch.equal(found.cond, plain.cond)
    assert torch.equal(found.uncond, plain.uncond)


@pytest.mark.parametrize(
    "weights",
    [
        EARLY,
        MllmLayerWeights("text-heavy"),
        MllmLayerWeights(text=(0.0, 1.0)),
        MllmLayerWeights(picture=(0.0, 1.0)),
        MllmLayerWeights(picture_weight=0.0),
    ],
)
def test_weights_of_layers_change_the_tokens(encode: Encode, weights: MllmLayerWeights) -> None:
    assert goldens.difference(encode(mllm_layers=weights).cond, encode().cond) > 1e-3


def test_a_picture_weight_of_a_whole_group_is_that_of_each_picture(encode: Encode) -> None:
    heavy = [Reference(r.picture, 3.0, r.name) for r in GROUP]
    found = encode(mllm_layers=MllmLayerWeights(picture_weight=3.0))
    assert torch.equal(found.cond, encode(heavy).cond)


def test_other_weights_of_layers_run_no_layer_of_the_body_again(
    encode: Encode, tokenizer: PromptTokenizer
) -> None:
    encoder, cache = pooled_encoder("dla", "lap"), EncodingCache()
    body = Calls([*encoder.multimodal_llm.model.layers, *encoder.multimodal_llm.visual.blocks])
    final = Calls(encoder.mllm_final_layer.layers)
    alone: dict[str, Any] = {"encoder": encoder, "cache": cache}
    encode(**alone)
    assert (body.number, final.number) == (2 * 3 + 3, 2)
    for changed in ({"mllm_layers": EARLY}, {"aggregation": "lap"}, {}):
        before, fresh = body.number, encode(**changed)
        found = encode(**alone, **changed)
        assert body.number == before
        assert torch.equal(found.cond, fresh.cond)
        assert torch.equal(found.uncond, fresh.uncond)
    before = body.number
    encode(**alone, prompt="a house")
    assert body.number == before + 3


def test_the_cache_tells_groups_prompts_and_insertions_apart(encode: Encode) -> None:
    cache = EncodingCache()
    for settings in (
        {},
        {"group": GROUP[::-1]},
        {"prompt": "a house"},
        {"insert_before": 3},
        {"insert_before": 2, "mllm_layers": EARLY},
        {"mllm_layers": EARLY},
        {"aggregation": "easyref"},
        {"aggregation": "lap"},
        {"negatives": OTHERS},
    ):
        found = encode(cache=cache, **settings)
        assert goldens.difference(found.cond, encode(**settings).cond) <= 1e-5
        assert goldens.difference(found.uncond, encode(**settings).uncond) <= 1e-5


@pytest.mark.parametrize("cached", [False, True])
def test_progress_reaches_its_end(encode: Encode, cached: bool) -> None:
    cache, steps = EncodingCache(), []
    if cached:
        encode(cache=cache)
    encode(cache=cache, mllm_layers=EARLY, progress=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert {total for _, total in steps} == {steps[-1][0]}


def test_attention_is_inspected_as_it_is_encoded(
    pooled: EasyRefEncoder, tokenizer: PromptTokenizer
) -> None:
    def inspected(**settings: Any) -> list[float]:
        plan = goldens.plan_of(pooled, tokenizer, GROUP, image_size=84, **settings)
        found = inspect_references(pooled, plan)
        shares = [*(p.share for p in found.pictures), found.prompt, found.frame, found.tokens]
        assert sum(shares) == pytest.approx(1)
        return shares

    plain, pooled_shares = inspected(), inspected(aggregation="dla")
    assert plain != pytest.approx(pooled_shares)
    heavy = inspected(aggregation="dla", mllm_layers=MllmLayerWeights("picture-heavy"))
    assert all(heavy[n] > pooled_shares[n] for n in range(2))


def test_an_aggregation_without_weights_is_refused_by_name(
    encode: Encode, encoder: EasyRefEncoder
) -> None:
    with goldens.refused("it.safetensors has no weights for aggregation 'dla'", "pools no layers"):
        encode(encoder=encoder)
    with goldens.refused("aggregation 'lap'", "it pools layers for dla", "dla or easyref"):
        encode(encoder=pooled_encoder("dla"), aggregation="lap")


@pytest.mark.parametrize("aggregation", ["easyref", "average", "concatenate"])
def test_weights_of_layers_need_layers_that_are_pooled(encode: Encode, aggregation: str) -> None:
    with goldens.refused("dla and lap", repr(aggregation), "disconnect mllm_layers"):
        encode(aggregation=aggregation, mllm_layers=EARLY)


def test_weights_of_layers_of_another_kind_are_refused(encode: Encode) -> None:
    with goldens.refused("mllm_layers is 'early'"):
        encode(mllm_layers="early")
