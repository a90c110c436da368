"""Regions: tokens of their own where their masks are white, and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from attention_spy import LayerRecord, Spy
from comfyhost import (
    GOLDEN_MLLM,
    Pack,
    apply,
    area,
    combine,
    latents,
    predict,
    put_adapter,
    random_text,
    random_tokens,
)
from goldens import adapter_tensors, difference
from region_nodes import LEFT, RIGHT, box, regions

CFG = 5.0
CLOSE = 5e-5
EXACT = 2e-5


@pytest.fixture
def texts() -> dict[str, Any]:
    return {
        "positive": random_text(1, pooled=64),
        "negative": random_text(2, pooled=64),
    }


@pytest.fixture
def groups(pack: Pack, demo_easyref: Any) -> list[Any]:
    """Tokens of the demo adapter, of three groups."""
    return [random_tokens(pack, demo_easyref, seed) for seed in (1, 2, 3)]


def truth_of(texts: dict[str, Any], tokens: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(texts["positive"][0][0], tokens.cond), (texts["negative"][0][0], tokens.uncond)]


def max_error(
    spy: Spy,
    texts: dict[str, Any],
    shares: Sequence[tuple[Any, Callable[[LayerRecord], Any]]],
) -> float:
    """The layers' largest difference from the text plus each of (tokens, scale)."""
    from attention_spy import _rows

    worst = 0.0
    for record in spy.records:
        expected = record.text
        for tokens, scale in shares:
            rows = _rows(record.context, truth_of(texts, tokens))
            expected = expected + scale(record) * spy.references(record, rows)
        worst = max(worst, difference(record.out, spy.to_out(record, expected)))
    assert spy.records
    return worst


def cells(mask: torch.Tensor) -> Callable[[LayerRecord], torch.Tensor]:
    """A mask at the positions of a layer, for masks that lie on whole cells."""

    def at(record: LayerRecord) -> torch.Tensor:
        step = mask.shape[-1] // record.grid[1]
        return mask[:, ::step, ::step].reshape(mask.shape[0], -1, 1)

    return at


def test_two_regions_with_complementary_masks_equal_two_apply_nodes(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    both = regions(pack, (groups[0], LEFT, {}), (groups[1], RIGHT, {"weight": 0.6}))
    spy = Spy(pack, demo_easyref, demo.model)
    model = apply(pack, demo.model, demo_easyref, None, regions=both)
    result = predict(spy.watch(model), CFG, latents(2), **texts)
    shares = [
        (groups[0], cells(LEFT)),
        (groups[1], lambda record: 0.6 * cells(RIGHT)(record)),
    ]
    assert max_error(spy, texts, shares) < EXACT
    chain = apply(pack, demo.model, demo_easyref, groups[0], mask=LEFT)
    chain = apply(pack, chain, demo_easyref, groups[1], mask=RIGHT, weight=0.6)
    assert difference(result, predict(chain, CFG, latents(2), **texts)) < CLOSE


def test_regions_add_to_the_tokens_and_overlaps_add_up(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    middle = box(0, 1, 0.25, 0.75)
    both = regions(pack, (groups[1], LEFT, {}), (groups[2], middle, {"weight": -0.5}))
    spy = Spy(pack, demo_easyref, demo.model)
    model = apply(pack, demo.model, demo_easyref, groups[0], regions=both)
    predict(spy.watch(model), CFG, **texts)
    shares = [
        (groups[0], lambda record: 1.0),
        (groups[1], cells(LEFT)),
        (groups[2], lambda record: -0.5 * cells(middle)(record)),
    ]
    assert max_error(spy, texts, shares) < EXACT


def test_normalise_shares_the_weight_where_regions_overlap(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    middle = box(0, 1, 0.25, 0.75)
    both = regions(pack, (groups[1], LEFT, {}), (groups[2], middle, {"weight": -0.5}))
    spy = Spy(pack, demo_easyref, demo.model)
    settings = {"regions": both, "normalise": True, "mask": box(0.5, 1, 0, 1)}
    predict(spy.watch(apply(pack, demo.model, demo_easyref, groups[0], **settings)), CFG, **texts)

    def scales(record: LayerRecord) -> list[torch.Tensor]:
        outer = cells(settings["mask"])(record)
        own = [outer, outer * cells(LEFT)(record), -0.5 * outer * cells(middle)(record)]
        total = sum(abs(scale) for scale in own)
        assert float(total.max()) > 2
        return [scale / total.clamp(min=1) for scale in own]

    shares = [(group, lambda record, i=i: scales(record)[i]) for i, group in enumerate(groups)]
    assert max_error(spy, texts, shares) < EXACT


def test_normalise_changes_nothing_where_the_weights_stay_below_one(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    both = regions(pack, (groups[0], LEFT, {"weight": 0.7}), (groups[1], RIGHT, {}))
    result = [
        predict(
            apply(pack, demo.model, demo_easyref, None, regions=both, normalise=on), CFG, **texts
        )
        for on in (False, True)
    ]
    assert difference(*result) < CLOSE


def test_the_settings_of_apply_count_for_its_regions_too(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    top = box(0, 0.5, 0, 1, cells=96)
    one = regions(pack, (groups[0], LEFT, {"weight": 0.5}))
    settings = {"weight": 1.2, "mask": top, "end_percent": 0.9}
    result = predict(
        apply(pack, demo.model, demo_easyref, None, regions=one, **settings), CFG, **texts
    )
    corner = box(0, 0.5, 0, 0.5)
    expected = apply(pack, demo.model, demo_easyref, groups[0], weight=0.6, mask=corner)
    assert difference(result, predict(expected, CFG, **texts)) < CLOSE
    late = apply(pack, demo.model, demo_easyref, None, regions=one, start_percent=0.9)
    nothing = apply(pack, demo.model, demo_easyref, groups[0], weight=0.0)
    assert difference(predict(late, CFG, **texts), predict(nothing, CFG, **texts)) < CLOSE


@pytest.fixture
def double(demo: Any) -> Iterator[Any]:
    """The demo's model in float64: in float32 its UNet magnifies the rounding of a larger batch."""
    unet = demo.model.model.diffusion_model
    dtype, model = unet.dtype, demo.model.clone()
    model.set_model_compute_dtype(torch.float64)
    unet.to(torch.float64)
    unet.dtype = torch.float64
    yield model
    unet.to(dtype)
    unet.dtype = dtype


def test_a_region_with_a_mask_for_each_latent(
    pack: Pack, double: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    masks = torch.cat([LEFT, RIGHT])
    model = apply(pack, double, demo_easyref, None, regions=regions(
        pack, (groups[0], masks, {}), (groups[1], LEFT, {})
    ))  # fmt: skip
    x = latents(2).double()
    together = predict(model, CFG, x, **texts)
    assert difference(together, predict(double, CFG, x, **texts)) > 1e-2
    for number in range(2):
        own = slice(number, number + 1)
        single = regions(pack, (groups[0], masks[own], {}), (groups[1], LEFT, {}))
        alone = apply(pack, double, demo_easyref, None, regions=single)
        assert difference(together[own], predict(alone, CFG, x[own], **texts)) < CLOSE


def test_a_region_with_a_batch_of_token_groups_and_other_numbers_of_tokens(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    core = pack.part("easyref_core.tokens.reference_tokens")
    batch = core.stack_tokens(groups[:2])
    long = core.ReferenceTokens(
        torch.cat([groups[1].cond, groups[2].cond], 1),
        torch.cat([groups[1].uncond, groups[2].uncond], 1),
        groups[0].adapter,
    )
    x = latents(2)
    given = regions(pack, (batch, LEFT, {}), (long, RIGHT, {}))
    together = predict(apply(pack, demo.model, demo_easyref, None, regions=given), CFG, x, **texts)
    for number in range(2):
        own = slice(number, number + 1)
        single = regions(pack, (groups[number], LEFT, {}), (long, RIGHT, {}))
        alone = apply(pack, demo.model, demo_easyref, None, regions=single)
        assert difference(together[own], predict(alone, CFG, x[own], **texts)) < CLOSE


def test_a_region_is_cut_where_a_texts_area_lies(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    """Two areas of one size in one call have different positions of one region."""
    halves = [area(random_text(n, pooled=64), (0.5, 1.0, x, 0.0)) for n, x in ((4, 0.0), (5, 0.5))]
    positive = combine(*halves)
    mask = box(0, 0.5, 0.125, 0.75, cells=32)
    x = latents(1, 32, 32)
    one = regions(pack, (groups[0], mask, {}))
    model = apply(pack, demo.model, demo_easyref, None, regions=one)
    result = predict(model, CFG, x, positive=positive, negative=texts["negative"])
    batched = torch.cat([mask, mask])[:1].expand(1, -1, -1)
    expected = apply(pack, demo.model, demo_easyref, groups[0], mask=batched)
    expected = predict(expected, CFG, x, positive=positive, negative=texts["negative"])
    assert difference(result, expected) < CLOSE
    # Against the path without gathered positions: a mask for each of two equal latents.
    twice = x.expand(2, -1, -1, -1)
    full = apply(pack, demo.model, demo_easyref, groups[0], mask=torch.cat([mask, mask]))
    full = predict(full, CFG, twice, positive=positive, negative=texts["negative"])
    assert difference(full[:1], result) < 1e-3


def test_layer_weights_and_curve_of_a_region_are_its_own(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    weights = pack.part("easyref_core.adapter.layer_weights").LayerWeights(
        {"output_1": 0.0, "middle": 2}
    )
    curve = pack.part("nodes.sampling.weights").Curve(((0.0, 0.4),))
    own = regions(
        pack,
        (groups[0], LEFT, {"layer_weights": weights, "curve": curve}),
        (groups[1], RIGHT, {}),
    )
    spy = Spy(pack, demo_easyref, demo.model)
    predict(spy.watch(apply(pack, demo.model, demo_easyref, None, regions=own)), CFG, **texts)
    factor = {"up_blocks.0.attentions.1": 0.0, "mid_block.attentions.0": 2.0}

    def scale(record: LayerRecord) -> torch.Tensor:
        module = record.layer.partition(".transformer_blocks")[0]
        return 0.4 * factor.get(module, 1.0) * cells(LEFT)(record)

    assert max_error(spy, texts, [(groups[0], scale), (groups[1], cells(RIGHT))]) < EXACT


def test_regions_compose_with_another_packs_patch_and_with_copies(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    class Half(Spy):
        def attend(self, q: Any, k: Any, v: Any, options: Any) -> torch.Tensor:
            return 0.5 * super().attend(q, k, v, options)

    both = copy.deepcopy(regions(pack, (groups[0], LEFT, {}), (groups[1], RIGHT, {})))
    steered = apply(pack, demo.model, demo_easyref, None, regions=both).clone()
    for order in ("before", "after"):
        other = Half(pack, demo_easyref, demo.model)
        if order == "before":
            model = apply(pack, other.watch(demo.model), demo_easyref, None, regions=both)
        else:
            model = other.watch(steered)
        predict(model, CFG, **texts)
        assert (
            max_error(other, texts, [(groups[0], cells(LEFT)), (groups[1], cells(RIGHT))]) < EXACT
        )


# Bad input


def test_more_than_sixteen_regions_are_refused(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any]
) -> None:
    sixteen = regions(pack, *((groups[0], LEFT, {}) for _ in range(16)))
    assert len(sixteen) == 16
    with pack.refused("17 regions", "up to 16", "second EasyRef Apply"):
        pack.run("EasyRefRegion", groups[0], LEFT, 1.0, previous=sixteen)
    with pack.refused("17 regions", "up to 16"):
        apply(pack, demo.model, demo_easyref, None, regions=(*sixteen, sixteen[0]))


def test_an_empty_list_of_regions_is_refused(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any]
) -> None:
    with pack.refused("regions is empty"):
        apply(pack, demo.model, demo_easyref, groups[0], regions=())


def test_a_region_with_masks_for_another_batch_is_refused(
    pack: Pack, demo: Any, demo_easyref: Any, groups: list[Any], texts: dict[str, Any]
) -> None:
    three = regions(pack, (groups[0], torch.ones(3, 8, 8), {}))
    model = apply(pack, demo.model, demo_easyref, None, regions=three)
    with pack.refused("batch of 3", "2 latents"):
        predict(model, CFG, latents(2), **texts)
    with pack.refused("batch of 3", "EasyRef Apply of 2"):
        apply(pack, demo.model, demo_easyref, None, regions=three, mask=torch.ones(2, 8, 8))


@pytest.mark.parametrize(
    ("mask", "said"), [(torch.full((1, 8, 8), float("nan")), "not numbers"),
                       (torch.ones(1, 0, 8), "[1, 0, 8]")]
)  # fmt: skip
def test_what_is_no_mask_is_refused_at_the_region(
    pack: Pack, groups: list[Any], mask: torch.Tensor, said: str
) -> None:
    with pack.refused("mask", said):
        pack.run("EasyRefRegion", groups[0], mask, 1.0)


def test_regions_of_another_adapter_are_refused(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    changed = {n: t * 1.5 for n, t in adapter_tensors().items()}
    name = put_adapter(pack, "another_for_regions.safetensors", changed)
    another = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    foreign = random_tokens(pack, another, seed=1)
    with pack.refused(name, "Region 2", "one adapter"):
        regions(pack, (tokens, LEFT, {}), (foreign, RIGHT, {}))
    with pack.refused(name, easyref.checkpoint.name):
        apply(pack, unet, easyref, tokens, regions=regions(pack, (foreign, LEFT, {})))


def test_apply_with_nothing_to_apply_is_refused_before_the_first_step(
    pack: Pack, demo: Any, demo_easyref: Any, texts: dict[str, Any]
) -> None:
    model = apply(pack, demo.model, demo_easyref, None)
    with pack.refused("neither tokens nor regions", "EasyRef Set Conditioning"):
        predict(model, CFG, **texts)
    off = apply(pack, demo.model, demo_easyref, None, weight=0.0)
    assert predict(off, CFG, **texts).isfinite().all()
