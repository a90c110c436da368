"""Tokens of several groups become one set, by the arithmetic that is written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.adapter.key_values import check_tokens
from easyref_core.tokens.combine import METHODS, WeightedTokens, combine_tokens, read_weights
from easyref_core.tokens.reference_tokens import ReferenceTokens, load_tokens, save_tokens
from easyref_core.untrusted import shown

MIXES = ("average", "add", "subtract")
BLACK = torch.randn((1, 4, 6), generator=torch.Generator().manual_seed(99))


def tokens(seed: int = 0, batch: int = 1, count: int = 4, **changes: Any) -> ReferenceTokens:
    """Tokens of one adapter; the same black picture in every group."""
    noise = torch.randn((batch, count, 6), generator=torch.Generator().manual_seed(seed))
    uncond = BLACK.repeat(batch, count // 4, 1)
    made = ReferenceTokens(noise, uncond, "0123456789abcdef", "a.safetensors", f"prompt {seed}", 2)
    return replace(made, **changes)


def parts(*given: ReferenceTokens, weights: tuple[float, ...] = ()) -> list[WeightedTokens]:
    weights = weights or (1.0,) * len(given)
    return [
        WeightedTokens(t, w, f"tokens_{number}")
        for number, (t, w) in enumerate(zip(given, weights, strict=True), start=1)
    ]


A, B, C = tokens(1), tokens(2), tokens(3)


@pytest.mark.parametrize(
    ("method", "weights", "wanted"),
    [
        ("average", (1, 1, 1), (A.cond + B.cond + C.cond) / 3),
        ("average", (1, 2, 1), (A.cond + 2 * B.cond + C.cond) / 4),
        ("average", (2, 0, 0), A.cond),
        ("average", (3, -1, -1), 3 * A.cond - B.cond - C.cond),
        ("add", (1, 1, 1), A.cond + B.cond + C.cond),
        ("add", (1, 0.5, -2), A.cond + 0.5 * B.cond - 2 * C.cond),
        ("subtract", (1, 1, 1), A.cond - B.cond - C.cond),
        ("subtract", (2, 0.5, -1), 2 * A.cond - 0.5 * B.cond + C.cond),
    ],
)
def test_arithmetic(method: str, weights: tuple[float, ...], wanted: torch.Tensor) -> None:
    found = combine_tokens(parts(A, B, C, weights=weights), method)
    assert goldens.difference(found.cond, wanted) < 1e-6
    assert torch.equal(found.uncond, A.uncond), "the black picture stays as it is"


def test_concatenation_appends_groups_in_order_and_keeps_every_bit() -> None:
    long = tokens(4, count=8)
    found = combine_tokens(parts(A, long, weights=(0.0, 3.0)), "concatenate")
    assert torch.equal(found.cond, torch.cat((A.cond, long.cond), dim=1))
    assert torch.equal(found.uncond, torch.cat((A.uncond, long.uncond), dim=1))


def test_the_avoided_group_takes_the_place_of_the_black_picture() -> None:
    found = combine_tokens(parts(A, B), "avoid")
    assert torch.equal(found.cond, A.cond)
    assert torch.equal(found.uncond, B.cond)


@pytest.mark.parametrize("method", MIXES)
def test_other_negative_branches_are_averaged(method: str) -> None:
    other = replace(B, uncond=B.uncond + 1)
    weights = (1, 3)
    found = combine_tokens(parts(A, other, weights=weights), method)
    share = 0.75 if method == "average" else 0.5
    assert goldens.difference(found.uncond, A.uncond + share) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_group_is_combined_with_each_of_a_batch(method: str) -> None:
    many = tokens(5, batch=3)
    found = combine_tokens(parts(A, many), method)
    assert found.batch == 3
    for number in range(3):
        alone = replace(many, cond=many.cond[number : number + 1], uncond=BLACK)
        wanted = combine_tokens(parts(A, alone), method)
        assert goldens.difference(found.cond[number : number + 1], wanted.cond) < 1e-6
        assert goldens.difference(found.uncond[number : number + 1], wanted.uncond) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_the_result_names_prompts_counts_and_method(method: str) -> None:
    found = combine_tokens(parts(A, replace(B, num_references=5)), method)
    assert (found.adapter, found.adapter_name) == (A.adapter, A.adapter_name)
    assert found.prompt == "prompt 1 | prompt 2"
    assert found.num_references == 7
    assert found.aggregation == f"{method} of 2"


def test_a_shared_prompt_appears_once() -> None:
    same = replace(B, prompt=A.prompt)
    assert combine_tokens(parts(A, same, replace(C, prompt="")), "average").prompt == A.prompt


def test_the_parts_are_left_as_they_were() -> None:
    before = A.cond.clone(), B.cond.clone()
    for method in METHODS:
        combine_tokens(parts(A, B, weights=(2, -1)), method)
    assert torch.equal(A.cond, before[0])
    assert torch.equal(B.cond, before[1])


@pytest.mark.parametrize("method", METHODS)
def test_combined_tokens_are_saved_and_still_belong_to_their_adapter(
    tmp_path: Path, checkpoint: AdapterCheckpoint, method: str
) -> None:
    shape = (1, checkpoint.num_tokens, checkpoint.token_width)
    own = [
        ReferenceTokens(torch.randn(shape), torch.zeros(shape), checkpoint.identity)
        for _ in range(2)
    ]
    made = combine_tokens(parts(*own), method)
    found = load_tokens(save_tokens(made, tmp_path / "tokens.safetensors"))
    assert torch.equal(found.cond, made.cond)
    assert found.aggregation == made.aggregation
    check_tokens(checkpoint, found)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", ()), ("  ", ()), ("1", (1,)), ("1, 0.5,-2", (1, 0.5, -2)), (" .5 ,\n1e0", (0.5, 1))],
)
def test_weights_are_read(text: str, wanted: tuple[float, ...]) -> None:
    assert read_weights(text) == wanted


@pytest.mark.parametrize("text", ["one", "1, ", "1; 2", "1, nan", "inf", "1,,2", "0,5 1"])
def test_weights_that_are_not_numbers_are_named(text: str) -> None:
    with goldens.refused("weights holds '", "no number", "1, 0.5, -0.2"):
        read_weights(text)


def test_more_weights_than_tokens_are_refused() -> None:
    assert read_weights("1, 2", 2) == (1, 2)
    with goldens.refused("3 numbers (1, 2, 3)", "tokens_2"):
        read_weights("1, 2, 3", 2)


# What cannot be combined


@pytest.mark.parametrize("method", METHODS)
def test_another_adapter_is_refused_by_both_names(method: str) -> None:
    other = replace(B, adapter="fedcba9876543210", adapter_name="b.safetensors")
    with goldens.refused("tokens_1", "a.safetensors", "tokens_2", "b.safetensors", "fedcba98"):
        combine_tokens(parts(A, other), method)


@pytest.mark.parametrize("method", METHODS)
def test_another_width_is_refused(method: str) -> None:
    wide = replace(B, cond=torch.zeros(1, 4, 8), uncond=torch.zeros(1, 4, 8))
    with goldens.refused("width 6", "width 8"):
        combine_tokens(parts(A, wide), method)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "concatenate"])
def test_another_count_is_refused_where_tokens_are_paired(method: str) -> None:
    with goldens.refused("tokens_1 hold 4", "tokens_2 8", repr(method), "'concatenate'"):
        combine_tokens(parts(A, tokens(2, count=8)), method)


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_different_sizes_are_refused(method: str) -> None:
    with goldens.refused("tokens_1 hold 2 groups", "tokens_2 3"):
        combine_tokens(parts(tokens(1, batch=2), tokens(2, batch=3)), method)


@pytest.mark.parametrize("weights", [(0, 0), (1, -1), (0.3, -0.3)])
def test_weights_that_add_up_to_nothing_are_refused(weights: tuple[float, float]) -> None:
    with goldens.refused("add up to 0", f"{weights[1]:g}", "'subtract'"):
        combine_tokens(parts(A, B, weights=weights), "average")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e30, "1", None, True])
def test_a_weight_that_is_not_a_number_is_refused(weight: Any) -> None:
    with goldens.refused("weight of tokens_2", shown(weight), "from -100 to 100"):
        parts(A, B, weights=(1, weight))


@pytest.mark.parametrize("text", ["1e308, 1e308", "101", "1, -2e3"])
def test_weights_that_would_overflow_are_refused(text: str) -> None:
    with goldens.refused("weights", "from -100 to 100"):
        read_weights(text)


def test_values_of_other_types_are_refused() -> None:
    with goldens.refused("weights is 5", "a text"):
        read_weights(5)
    with goldens.refused("Part 2 is a ReferenceTokens"):
        combine_tokens([*parts(A), B], "add")
    with goldens.refused("tokens_1 is 'a'"):
        WeightedTokens("a", name="tokens_1")
    for method in (None, ["add"], 5):
        with goldens.refused("method", shown(method)):
            combine_tokens(parts(A, B), method)


@pytest.mark.parametrize("given", [(), (A,)])
def test_fewer_than_two_are_refused(given: tuple[ReferenceTokens, ...]) -> None:
    with goldens.refused(f"{len(given)} sets", "tokens_2"):
        combine_tokens(parts(*given), "average")


def test_avoid_takes_two() -> None:
    with goldens.refused("'avoid'", "tokens_1, tokens_2, tokens_3", "into one first"):
        combine_tokens(parts(A, B, C), "avoid")


def test_an_unknown_method_is_refused() -> None:
    with goldens.refused("'multiply'", "average"):
        combine_tokens(parts(A, B), "multiply")
