"""Of a group that was encoded before, only what is new runs, and the tokens are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import goldens
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from easyref_core.adapter.layer_pooling import POOLS
from easyref_core.encode.cache import EncodingCache, LruCache, _bytes_per_token
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import AGGREGATIONS, BASELINES, Reference
from easyref_core.encode.inspection import inspect_references
from easyref_core.encode.layer_pooling import add_layer_pools
from easyref_core.encode.mllm_layers import MllmLayerWeights
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

COLOURS = ("red", "blue", "green", "white")
SIZES = ((90, 60), (60, 90), (84, 84), (120, 40))
PICTURES = [
    Reference(Image.new("RGB", size, colour), name=colour)
    for colour, size in zip(COLOURS, SIZES, strict=True)
]
GROUP, FOURTH = PICTURES[:3], PICTURES[3]
EARLY = MllmLayerWeights("early")
Encode = Callable[..., ReferenceTokens]


def pooled_encoder(final_layers: int = 1, **sizes: int) -> EasyRefEncoder:
    encoder = goldens.random_encoder(final_layers=final_layers, **sizes)
    for aggregation in POOLS:
        add_layer_pools(encoder, aggregation)
    goldens.randomise(encoder.mllm_layer_pooling, 1)
    return encoder.requires_grad_(False)


class Rows:
    """Counts what runs: pictures in the vision tower, and rows in the decoder layers.

    Attributes:
        body: rows in each layer of the body.
        last: rows of which the last layer computed keys and values.
    """

    def __init__(self, encoder: EasyRefEncoder) -> None:
        body = encoder.multimodal_llm
        self._handles = [
            body.visual.register_forward_hook(self._saw_pictures),
            body.model.layers[0].register_forward_hook(self._ran),
            encoder.mllm_final_layer.layers[-1].register_forward_hook(self._ran_last),
        ]
        self.reset()

    def reset(self) -> None:
        self.pictures = self.body = self.last = 0

    def _saw_pictures(self, _: Any, given: tuple[Any, ...], out: torch.Tensor) -> None:
        self.pictures += len(given[1])

    def _ran(self, _: Any, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.body += given[0].shape[1]

    def _ran_last(self, _: Any, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.last += given[0].shape[1]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.fixture(scope="module")
def pooled() -> EasyRefEncoder:
    return pooled_encoder()


@pytest.fixture
def rows(pooled: EasyRefEncoder) -> Iterator[Rows]:
    counted = Rows(pooled)
    yield counted
    counted.remove()


@pytest.fixture
def encode(pooled: EasyRefEncoder, tokenizer: PromptTokenizer) -> Encode:
    def run(
        group: Sequence[Reference] = GROUP, prompt: str = "a boat", **options: Any
    ) -> ReferenceTokens:
        settings = {"image_size": goldens.IMAGE_SIZE} | options
        return goldens.encode(settings.pop("encoder", pooled), tokenizer, group, prompt, **settings)

    return run


@pytest.fixture
def length(pooled: EasyRefEncoder, tokenizer: PromptTokenizer) -> Callable[..., int]:
    """Tokens of the chat of a group."""

    def count(group: Sequence[Reference] = GROUP, prompt: str = "a boat") -> int:
        options = {"image_size": goldens.IMAGE_SIZE}
        plan = goldens.plan_of(pooled, tokenizer, group, prompt, **options)
        return len(plan.passes[0].chat)

    return count


@pytest.fixture
def up_to(pooled: EasyRefEncoder, tokenizer: PromptTokenizer) -> Callable[[int], int]:
    """Tokens of the group's chat up to the end of so many pictures."""

    def end(pictures: int) -> int:
        plan = goldens.plan_of(pooled, tokenizer, GROUP, "", image_size=goldens.IMAGE_SIZE)
        return plan.passes[0].chat.image_spans[pictures - 1][1] if pictures else 0

    return end


def assert_same(found: ReferenceTokens, wanted: ReferenceTokens) -> None:
    assert goldens.difference(found.cond, wanted.cond) <= 1e-5
    assert goldens.difference(found.uncond, wanted.uncond) <= 1e-5


def edited(place: int) -> list[Reference]:
    return [*GROUP[:place], FOURTH, *GROUP[place + 1 :]]


@pytest.mark.parametrize(
    ("group", "prompt", "known", "seen"),
    [
        pytest.param(GROUP, "a house by the sea", 3, 0, id="another prompt"),
        pytest.param([*GROUP, FOURTH], "a boat", 3, 1, id="a picture added"),
        pytest.param(edited(2), "a boat", 2, 1, id="the last changed"),
        pytest.param(edited(0), "a boat", 0, 1, id="the first changed"),
        pytest.param(GROUP[:2], "a boat", 2, 0, id="the last removed"),
        pytest.param([GROUP[0], GROUP[2]], "a boat", 1, 0, id="the second removed"),
        pytest.param([GROUP[0], GROUP[2], GROUP[1]], "a boat", 1, 0, id="two exchanged"),
    ],
)
@pytest.mark.parametrize("aggregation", ["easyref", *POOLS])
def test_only_what_follows_a_change_runs(
    encode: Encode, rows: Rows, length: Any, up_to: Any, aggregation: str, group: Any, prompt: str,
    known: int, seen: int,
) -> None:  # fmt: skip
    cache, options = EncodingCache(), {"aggregation": aggregation}
    encode(cache=cache, **options)
    rows.reset()
    found = encode(group, prompt, cache=cache, **options)
    new = length(group, prompt) - up_to(known)
    assert (rows.pictures, rows.body, rows.last) == (seen, new, new + 16)
    assert_same(found, encode(group, prompt, **options))


@pytest.mark.parametrize("aggregation", ["easyref", *POOLS])
def test_a_changed_weight_runs_the_reference_tokens_through_the_last_layer(
    encode: Encode, rows: Rows, aggregation: str
) -> None:
    cache, options = EncodingCache(), {"aggregation": aggregation}
    encode(cache=cache, **options)
    heavy = [GROUP[0], replace(GROUP[1], weight=3.0), GROUP[2]]
    rows.reset()
    found = encode(heavy, cache=cache, **options)
    assert (rows.pictures, rows.body, rows.last) == (0, 0, 16)
    assert_same(found, encode(heavy, **options))


@pytest.mark.parametrize("aggregation", ["easyref", *POOLS, *BASELINES])
def test_the_same_again_runs_nothing(encode: Encode, rows: Rows, aggregation: str) -> None:
    cache, options = EncodingCache(), {"aggregation": aggregation, "negatives": [FOURTH]}
    wanted = encode(cache=cache, **options)
    rows.reset()
    found = encode(cache=cache, **options)
    assert (rows.pictures, rows.body, rows.last) == (0, 0, 0)
    assert torch.equal(found.cond, wanted.cond)
    assert torch.equal(found.uncond, wanted.uncond)


@pytest.mark.parametrize("aggregation", BASELINES)
def test_pictures_encoded_alone_are_reused_each(
    encode: Encode, rows: Rows, length: Any, up_to: Any, aggregation: str
) -> None:
    cache, options = EncodingCache(), {"aggregation": aggregation}
    encode(cache=cache, **options)
    heavy = [GROUP[0], replace(GROUP[1], weight=3.0), GROUP[2]]
    rows.reset()
    assert_same(encode(heavy, cache=cache, **options), encode(heavy, **options))
    rows.reset()
    encode(heavy, cache=cache, **options)
    assert (rows.pictures, rows.body) == (0, 0)
    found = encode(prompt="a house", cache=cache, **options)
    tail = length(GROUP[:1], "a house") - up_to(1)
    assert (rows.pictures, rows.body) == (0, 3 * tail)
    assert_same(found, encode(prompt="a house", **options))
    rows.reset()
    encode([*GROUP[::-1], FOURTH], "a house", cache=cache, **options)
    assert (rows.pictures, rows.body) == (1, length([FOURTH], "a house"))


def test_negatives_are_continued_too(encode: Encode, rows: Rows, length: Any, up_to: Any) -> None:
    cache = EncodingCache()
    encode(negatives=GROUP, cache=cache)
    rows.reset()
    found = encode(negatives=[*GROUP, FOURTH], cache=cache)
    assert (rows.pictures, rows.body) == (1, length([*GROUP, FOURTH], "") - up_to(3))
    assert_same(found, encode(negatives=[*GROUP, FOURTH]))


def test_other_weights_of_layers_run_final_layers_only(
    encode: Encode, rows: Rows, length: Any, up_to: Any
) -> None:
    cache = EncodingCache()
    encode(cache=cache, aggregation="dla")
    wanted = encode(aggregation="dla", mllm_layers=EARLY)
    rows.reset()
    assert_same(encode(cache=cache, aggregation="dla", mllm_layers=EARLY), wanted)
    assert (rows.pictures, rows.body) == (0, 0)
    found = encode(cache=cache, aggregation="dla", prompt="a house", mllm_layers=EARLY)
    assert rows.body == length(prompt="a house") - up_to(3)
    assert_same(found, encode(aggregation="dla", prompt="a house", mllm_layers=EARLY))


CHANGES = st.fixed_dictionaries(
    {
        "group": st.lists(st.sampled_from(range(4)), min_size=1, max_size=4),
        "weight": st.sampled_from([1.0, 0.0, 2.5]),
        "prompt": st.sampled_from(["", "a boat", "a boat at night", "猫"]),
        "aggregation": st.sampled_from(AGGREGATIONS),
        "insert_before": st.sampled_from([None, 1, 2, 3]),
        "negatives": st.sampled_from([(), (0,), (1, 0)]),
        "early": st.booleans(),
    }
)


@pytest.mark.parametrize("final_layers", [1, 2])
@given(
    changes=st.lists(CHANGES, min_size=2, max_size=5), budget=st.sampled_from([None, 0, 1, 2, 9])
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_change_after_any_other_gives_the_tokens_of_a_new_encoder(
    tokenizer: PromptTokenizer, final_layers: int, changes: Any, budget: int | None
) -> None:
    """Also where some of what was kept has been dropped."""
    encoder = pooled_encoder(final_layers)
    tiny = {} if budget is None else {"prefixes": budget * 40_000, "image_features": 20_000}
    cache = EncodingCache(tokens=0, **tiny)
    for change in changes:
        pictures = [PICTURES[n] for n in change["group"]]
        pictures[-1:] = [replace(pictures[-1], weight=change["weight"])]
        if change["aggregation"] in BASELINES and not any(p.weight for p in pictures):
            continue
        options = {
            "image_size": goldens.IMAGE_SIZE,
            "aggregation": change["aggregation"],
            "insert_before": change["insert_before"],
            "negatives": [PICTURES[n] for n in change["negatives"]],
        }
        if change["early"] and change["aggregation"] in POOLS:
            options["mllm_layers"] = EARLY
        given = (encoder, tokenizer, pictures, change["prompt"])
        assert_same(
            goldens.encode(*given, **options, cache=cache), goldens.encode(*given, **options)
        )


@pytest.mark.parametrize(("budget", "prompts"), [(200_000, False), (8_000_000, True)])
def test_what_is_kept_is_bounded_and_survives_nothing_it_should_not(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, budget: int, prompts: bool
) -> None:
    cache, peaks, begin = EncodingCache(prefixes=budget), [], EncodingCache.begin

    def noted(*given: Any) -> Any:
        chat = begin(*given)
        held = {id(t): t for part in chat.parts for t in (part.body, part.final)}
        held |= {id(t): t for t in cache._pictures._items.values()}
        peaks.append(sum(tensor.nbytes for tensor in held.values()))
        return chat

    monkeypatch.setattr(EncodingCache, "begin", noted)
    for number in range(24):
        picture = Reference(Image.new("RGB", (84, 84), (number * 10, 0, 0)))
        encode([picture, *GROUP], f"prompt {number}", cache=cache)
        kept = cache._pictures.nbytes, cache._prompts.nbytes
        assert 0 < kept[0] <= budget
        assert (kept[1] > 0) == prompts
        assert kept[1] <= budget // 16
    assert max(peaks) <= 1.1 * budget
    cache.clear()
    assert cache.nbytes == 0


@pytest.mark.parametrize("aggregation", ["easyref", "dla"])
def test_by_default_64_pictures_of_a_usual_size_are_kept_edit_after_edit(
    tokenizer: PromptTokenizer, aggregation: str
) -> None:
    encoder, cache = pooled_encoder(), EncodingCache()
    pictures = [Reference(Image.new("RGB", (336, 336), (3 * n, 0, 0))) for n in range(64)]
    options = {"image_size": 336, "aggregation": aggregation, "cache": cache}
    goldens.encode(encoder, tokenizer, pictures, "a boat", **options)
    rows = Rows(encoder)
    for prompt in ("a house", "a tree by the sea", "a boat at night"):
        rows.reset()
        goldens.encode(encoder, tokenizer, pictures, prompt, **options)
        assert rows.pictures == 0
        assert rows.body < 60  # of about 9,300
    rows.remove()


def test_of_a_chat_longer_than_the_cache_the_beginning_is_kept(
    encode: Encode, pooled: EasyRefEncoder, rows: Rows, length: Any, up_to: Any
) -> None:
    cache = EncodingCache(prefixes=up_to(2) * _bytes_per_token(pooled, 0), tokens=0)
    for prompt in ("a boat", "a house", "a tree", "a hill"):
        rows.reset()
        encode(prompt=prompt, negatives=GROUP[:1], cache=cache)
    tail = length(GROUP[:1], "") - up_to(1)
    assert rows.body == length(prompt="a hill") - up_to(2) + tail


def test_where_memory_for_what_is_kept_is_short_nothing_is_kept(
    encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr("easyref_core.encode.cache.ChatState", full)
    cache = EncodingCache()
    assert_same(encode(cache=cache), encode())
    assert cache._pictures.nbytes == 0


def test_a_run_sets_aside_memory_only_for_what_can_be_kept(
    encode: Encode, pooled: EasyRefEncoder, up_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, begin = [], EncodingCache.begin
    monkeypatch.setattr(
        EncodingCache, "begin", lambda *given: chats.append(begin(*given)) or chats[-1]
    )
    budget = up_to(1) * _bytes_per_token(pooled, 0)
    encode(cache=EncodingCache(prefixes=budget))
    (part,) = chats[0].parts
    assert part.body.nbytes + part.final.nbytes == budget


def test_an_mllm_of_final_layers_only_is_continued(
    tokenizer: PromptTokenizer, encode: Encode
) -> None:
    encoder = goldens.random_encoder(final_layers=4).requires_grad_(False)
    assert len(encoder.multimodal_llm.model.layers) == 0
    cache = EncodingCache()
    encode(encoder=encoder, cache=cache)
    assert_same(
        encode(GROUP, "a house", encoder=encoder, cache=cache),
        encode(GROUP, "a house", encoder=encoder),
    )


def test_a_value_larger_than_all_that_may_be_kept_drops_nothing() -> None:
    cache = LruCache[torch.Tensor](40)
    cache.put(b"small", torch.zeros(5))
    cache.put(b"large", torch.zeros(11))
    assert cache.get(b"small") is not None
    assert cache.get(b"large") is None


def test_tensors_that_are_kept_share_no_memory_with_others(encode: Encode) -> None:
    """Otherwise what is dropped would stay in memory."""
    cache = EncodingCache()
    encode(cache=cache, aggregation="dla")
    for tensor in [*cache._pictures._items.values(), *cache._prompts._items.values()]:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("last", [2, 5])
def test_an_interrupted_encoding_leaves_nothing_half_done(
    encode: Encode, rows: Rows, last: int
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == last:
            raise Stop

    cache, wanted = EncodingCache(), encode()
    with pytest.raises(Stop):
        encode(cache=cache, progress=stop)
    assert (cache._pictures.nbytes, cache.tokens.nbytes) == (0, 0)
    rows.reset()
    assert_same(encode(cache=cache), wanted)
    # The black one, and those that were not reached.
    assert rows.pictures == 1 + max(0, 3 - last)


def test_values_that_are_not_numbers_are_not_kept(tokenizer: PromptTokenizer) -> None:
    encoder, cache = pooled_encoder(), EncodingCache()
    weight = encoder.multimodal_llm.model.layers[1].mlp.up_proj.weight
    good, options = weight.clone(), {"image_size": goldens.IMAGE_SIZE, "cache": cache}
    weight.fill_(float("inf"))
    with goldens.refused("not numbers"):
        goldens.encode(encoder, tokenizer, GROUP, **options)
    weight.copy_(good)
    found = goldens.encode(encoder, tokenizer, GROUP, **options)
    assert torch.isfinite(found.cond).all()


def test_inspecting_and_encoding_continue_each_other(
    pooled: EasyRefEncoder, tokenizer: PromptTokenizer, encode: Encode, rows: Rows
) -> None:
    cache = EncodingCache()
    plan = goldens.plan_of(pooled, tokenizer, GROUP, "a boat", image_size=goldens.IMAGE_SIZE)
    alone = inspect_references(pooled, plan)
    encode(prompt="a house", cache=cache)
    rows.reset()
    found = inspect_references(pooled, plan, cache=cache)
    assert (rows.pictures, rows.body) == (
        0,
        len(plan.passes[0].chat) - plan.passes[0].segments[-2].end,
    )
    for picture, other in zip(found.pictures, alone.pictures, strict=True):
        assert goldens.difference(picture.heat, other.heat) <= 1e-6
    rows.reset()
    assert_same(encode(cache=cache), encode())
    rows.reset()
    inspect_references(pooled, plan, cache=cache)
    assert rows.body == 0


def test_bfloat16_is_continued_within_its_rounding(tokenizer: PromptTokenizer) -> None:
    encoder, cache = pooled_encoder().bfloat16(), EncodingCache()
    encoder.compute_dtype = torch.bfloat16
    given = (encoder, tokenizer, GROUP)
    goldens.encode(*given, "a house", image_size=goldens.IMAGE_SIZE, cache=cache)
    found = goldens.encode(*given, "a boat", image_size=goldens.IMAGE_SIZE, cache=cache)
    wanted = goldens.encode(*given, "a boat", image_size=goldens.IMAGE_SIZE)
    assert float((found.cond - wanted.cond).norm() / wanted.cond.norm()) < 0.02
    assert {t.dtype for t in cache._pictures._items.values()} == {torch.bfloat16}


def test_the_least_recently_used_is_dropped() -> None:
    cache = LruCache[torch.Tensor](budget=2 * torch.zeros(1).nbytes)
    for name in (b"a", b"b"):
        cache.put(name, torch.zeros(1))
    assert cache.get(b"a") is not None
    cache.put(b"c", torch.zeros(1))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    cache.put(b"a", torch.zeros(2))
    assert (cache.get(b"c"), cache.nbytes) == (None, 8)
