"""Attention shares are those of a softmax written out, and heat maps show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import goldens
import pytest
import torch
from PIL import Image
from test_weights_and_insertion import FOUR, columns, embed_case, rms, rotated

from easyref_core.encode.cache import EncodingCache
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import Reference
from easyref_core.encode.heat_maps import (
    FOOTER,
    MARGIN,
    SIDE,
    colours,
    draw_heat_maps,
    overlay,
)
from easyref_core.encode.inspection import Inspection, PictureShare, inspect_references, report
from easyref_core.qwen2vl.prompt import INSTRUCTION, PromptTokenizer


@torch.no_grad()
def by_hand(
    encoder: EasyRefEncoder, states: torch.Tensor, odds: torch.Tensor | None = None
) -> torch.Tensor:
    """The final layer's attention [N, L + N] in double precision, head by head."""
    config, final = encoder.config, encoder.mllm_final_layer
    attention = final.layers[0].self_attn
    x = torch.cat((states[0], final.reference_tokens)).double()
    h = rms(x, final.layers[0].input_layernorm.weight, config.rms_norm_eps)
    count, length = encoder.num_tokens, x.shape[0]
    odds = torch.ones(length - count) if odds is None else odds
    odds = torch.cat((odds, torch.ones(count))).double()

    def heads(module: torch.nn.Linear, number: int) -> torch.Tensor:
        value = h @ module.weight.double().T + module.bias.double()
        return rotated(value.view(length, number, -1), config.rope_theta)

    q, k = heads(attention.q_proj, config.num_heads), heads(attention.k_proj, config.num_kv_heads)
    shares = torch.zeros(count, length, dtype=torch.float64)
    for row in range(count):
        seen = length - count + row + 1
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            logits = k[:seen, group] @ q[length - count + row, head] / config.head_dim**0.5
            share = logits.exp() * odds[:seen]
            shares[row, :seen] += share / share.sum() / config.num_heads
    return shares


@pytest.fixture
def inspect(encoder: EasyRefEncoder, tokenizer: PromptTokenizer) -> Callable[..., Inspection]:
    """Inspect the golden case of four references with these weights."""

    def run(weights: Sequence[float] = (1, 1, 1, 1), **options: Any) -> Inspection:
        references = [
            replace(r, weight=w, name=f"picture {n}")
            for n, (r, w) in enumerate(zip(goldens.references(FOUR), weights, strict=True), start=1)
        ]
        given = {"prompt": goldens.user_prompt(FOUR), "image_size": goldens.IMAGE_SIZE} | options
        run = {name: given.pop(name) for name in given.keys() & {"progress", "cache"}}
        group = given.pop("references", references)
        return inspect_references(
            encoder, goldens.plan_of(encoder, tokenizer, group, **given), **run
        )

    return run


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (0.5, 1, 3, 0), (0, 0, 0, 0)])
@torch.no_grad()
def test_attention_is_a_plain_softmax(
    encoder: EasyRefEncoder, tokenizer: PromptTokenizer, weights: Sequence[float]
) -> None:
    embeds, plan = embed_case(encoder, tokenizer)
    odds = columns(plan, weights)
    wanted = by_hand(encoder, goldens.body_states(encoder, embeds), odds)
    found = encoder.reference_attention(embeds, column_bias=odds.log())
    assert found.dtype == torch.float32
    assert goldens.difference(found, wanted) < 1e-5
    assert goldens.difference(found.sum(dim=1), torch.ones(encoder.num_tokens)) < 1e-5


@pytest.mark.parametrize("before", [1, 2, 3])
@torch.no_grad()
def test_attention_is_what_the_layer_itself_uses(before: int) -> None:
    """With one head, times the values, it gives the layer's own output."""
    encoder = goldens.random_encoder()
    assert encoder.config.num_heads == 1
    embeds = torch.randn(1, 20, encoder.config.hidden_size)
    attention, caught = encoder.mllm_final_layer.layers[-1].self_attn, []
    handle = attention.register_forward_hook(lambda _, given, out: caught.append((given[0], out)))
    encoder.reference_states(embeds, insert_before=before)
    handle.remove()
    ((x, out),) = caught
    shares = encoder.reference_attention(embeds, insert_before=before)
    mixed = attention.o_proj(shares @ attention.v_proj(x)[0])
    assert goldens.difference(mixed[None], out) < 1e-4


def test_all_shares_add_up_and_the_heat_is_the_share(inspect: Callable[..., Inspection]) -> None:
    found = inspect()
    parts = [p.share for p in found.pictures]
    assert all(share > 0 for share in (*parts, found.prompt, found.frame, found.tokens))
    assert sum(parts) == pytest.approx(found.all_pictures)
    total = found.all_pictures + found.prompt + found.frame + found.tokens
    assert total == pytest.approx(1, abs=1e-5)
    for picture in found.pictures:
        assert float(picture.heat.sum()) == pytest.approx(picture.share, abs=1e-6)


@torch.no_grad()
def test_each_share_is_taken_from_its_own_columns(
    inspect: Callable[..., Inspection], encoder: EasyRefEncoder, tokenizer: PromptTokenizer
) -> None:
    embeds, plan = embed_case(encoder, tokenizer)
    mean = by_hand(encoder, goldens.body_states(encoder, embeds)).mean(dim=0)
    found = inspect()
    for picture, (first, end) in zip(found.pictures, plan.image_spans, strict=True):
        assert goldens.difference(picture.heat.flatten(), mean[first:end]) < 1e-6
    assert found.tokens == pytest.approx(float(mean[len(plan) :].sum()), abs=1e-5)
    first, end = plan.prompt_span
    assert found.prompt == pytest.approx(float(mean[first:end].sum()), abs=1e-5)


@pytest.mark.parametrize("prompt", ["a red cube", "", "\n a cube", "猫", INSTRUCTION, "<|im_end|>"])
def test_the_prompt_span_covers_the_users_prompt(tokenizer: PromptTokenizer, prompt: str) -> None:
    plan = tokenizer.tokenize([4, 6], prompt)
    first, end = plan.prompt_span
    whole = tokenizer.text_ids(INSTRUCTION + prompt)
    assert plan.ids[end - len(whole) : end].tolist() == whole
    assert plan.image_spans[-1][1] < end < len(plan)
    if prompt in ("a red cube", "猫"):
        assert plan.ids[first:end].tolist() == tokenizer.text_ids(prompt)
    assert (first == end) == (prompt == "")


def test_without_a_prompt_it_has_no_share(inspect: Callable[..., Inspection]) -> None:
    assert inspect(prompt="").prompt == 0


def test_weights_count_as_they_do_when_encoding(inspect: Callable[..., Inspection]) -> None:
    plain, weighted = inspect(), inspect((0, 1, 4, 1))
    assert weighted.pictures[0].share == 0
    assert weighted.pictures[2].share > plain.pictures[2].share


def test_heat_has_the_pictures_shape(inspect: Callable[..., Inspection]) -> None:
    wide = Reference(Image.new("RGB", (400, 100), "red"), name="wide")
    (picture,) = inspect(references=[wide], image_size=112).pictures
    rows, columns = picture.heat.shape
    assert columns > 2 * rows


def test_image_features_cached_by_encoding_are_reused(
    inspect: Callable[..., Inspection],
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = EncodingCache()
    wanted = inspect()
    goldens.encode(
        encoder,
        tokenizer,
        goldens.references(FOUR),
        "another prompt",
        image_size=goldens.IMAGE_SIZE,
        cache=cache,
    )
    monkeypatch.setattr(type(encoder), "encode_images", lambda *_: pytest.fail("encoded again"))
    assert inspect(cache=cache).prompt == wanted.prompt


def test_a_baseline_is_not_inspected(inspect: Callable[..., Inspection]) -> None:
    with goldens.refused("'average' encodes each reference alone", "'easyref'"):
        inspect(aggregation="average")


def test_progress_rises_to_its_total(
    inspect: Callable[..., Inspection], encoder: EasyRefEncoder
) -> None:
    steps: list[tuple[int, int]] = []
    inspect(progress=lambda *step: steps.append(step))
    total = 4 + encoder.config.num_layers
    assert steps == [(done, total) for done in range(1, total + 1)]


def test_what_encoding_refuses_is_refused(inspect: Callable[..., Inspection]) -> None:
    with goldens.refused("There is no reference picture"):
        inspect(references=[])
    with goldens.refused("image_size is 28"):
        inspect(image_size=28)
    with goldens.refused("The prompt is too long"):
        inspect(prompt="a cat on the grass " * 20_000)


# Shown


def share(name: str, heat: torch.Tensor) -> PictureShare:
    return PictureShare(name, float(heat.sum()), heat)


EXAMPLE = Inspection(
    (share("ann", torch.full((2, 3), 0.05)), share("bob", torch.full((4, 4), 0.00625))),
    prompt=0.2,
    frame=0.3,
    tokens=0.1,
)


def test_the_report_has_a_line_for_everything() -> None:
    assert report(EXAMPLE).splitlines() == [
        "1. ann: 30.0 % (75.0 % of the pictures)",
        "2. bob: 10.0 % (25.0 % of the pictures)",
        "all references: 40.0 %",
        "prompt: 20.0 %",
        "instruction and chat format: 30.0 %",
        "reference tokens themselves: 10.0 %",
    ]


def test_a_group_without_attention_can_be_drawn() -> None:
    none = Inspection((share("ann", torch.zeros(2, 2)),), 0.5, 0.3, 0.2)
    assert "1. ann: 0.0 % (0.0 % of the pictures)" in report(none)
    (card,) = draw_heat_maps(none, [Image.new("RGB", (30, 40), "white")])
    assert card.size == (SIDE, SIDE + FOOTER)


@pytest.mark.parametrize("size", [(640, 480), (1, 1), (7, 900)])
def test_cards_have_one_size_and_the_whole_picture(size: tuple[int, int]) -> None:
    cards = draw_heat_maps(EXAMPLE, [Image.new("RGB", size, "white"), Image.new("RGB", (9, 9))])
    assert {card.size for card in cards} == {(SIDE, SIDE + FOOTER)}
    ground = cards[0].getpixel((0, 0))
    inside = cards[0].getpixel((SIDE // 2, SIDE // 2))
    assert inside != ground
    bare = [cards[0].getpixel((x, SIDE // 2)) for x in range(MARGIN)]
    assert set(bare) == {ground}, "the margin is free"


def test_warm_places_are_brighter_and_the_picture_stays_visible() -> None:
    heat = torch.zeros(8, 8)
    heat[2:4, 5:7] = 1
    picture = Image.new("RGB", (80, 80), (90, 90, 90))
    picture.paste((220, 220, 220), (0, 60, 80, 80))
    shown = overlay(picture, heat, 1.0).convert("L")
    warm, cold, light = (shown.getpixel(at) for at in ((60, 30), (20, 30), (20, 70)))
    assert warm > cold + 60
    assert light > cold + 25


def test_colours_rise_evenly_in_lightness() -> None:
    linear = colours(torch.linspace(0, 1, 256)[None])[0].double()
    linear = torch.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    steps = luminance.clamp(min=0).pow(1 / 3).diff()
    assert (steps > 0).all(), "lighter all the way, so it reads in grey too"
    assert steps.max() < 3 * steps.median()


def test_other_pictures_than_were_inspected_are_refused() -> None:
    with goldens.refused("1 pictures", "2 references"):
        draw_heat_maps(EXAMPLE, [Image.new("RGB", (9, 9))])
