"""Where references act: masks at every attention resolution, of every shape, and their batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import LayerRecord, Spy
from comfyhost import Pack, apply, latents, predict, random_text, random_tokens
from goldens import difference

CFG = 5.0
CLOSE = 5e-5
EXACT = 2e-5
SIZES = [(16, 16), (24, 40), (13, 21), (40, 16)]  # latent height and width


def half(side: str, height: int, width: int) -> torch.Tensor:
    """A mask [1, H, W], white on one side."""
    mask = torch.zeros(1, height, width)
    if side in ("left", "right"):
        columns = slice(0, width // 2) if side == "left" else slice(width // 2, None)
        mask[:, :, columns] = 1
    else:
        mask[:, slice(0, height // 2) if side == "top" else slice(height // 2, None)] = 1
    return mask


def cells(side: str, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] an attention layer's positions clearly on that side, and clearly on the other."""
    across = side in ("left", "right")
    count = grid[1] if across else grid[0]
    place = (torch.arange(count) + 0.5) / count
    first, second = place < 0.5 - 1 / count, place > 0.5 + 1 / count
    if side in ("right", "bottom"):
        first, second = second, first
    on, off = ((c[None, :] if across else c[:, None]).expand(grid) for c in (first, second))
    return on.flatten(), off.flatten()


def shares(
    spy: Spy, record: LayerRecord, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the references changed in a layer's output, and what they would without a mask."""
    text = spy.to_out(record, record.text)
    whole = spy.to_out(record, record.text + spy.references(record, tokens))
    return record.out - text, whole - text


@pytest.fixture
def text() -> Any:
    return random_text(1, pooled=64)


@pytest.fixture
def demo_tokens(pack: Pack, demo_easyref: Any) -> Any:
    return random_tokens(pack, demo_easyref, seed=3)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_half_a_mask_acts_on_that_half_at_every_attention_resolution(
    pack: Pack,
    demo: Any,
    demo_easyref: Any,
    demo_tokens: Any,
    text: Any,
    size: tuple[int, int],
    side: str,
) -> None:
    mask = half(side, size[0] * 8, size[1] * 8)
    spy = Spy(pack, demo_easyref, demo.model)
    model = apply(pack, demo.model, demo_easyref, demo_tokens, mask=mask)
    predict(spy.watch(model), x=latents(1, *size), positive=text)
    assert len({record.grid for record in spy.records}) > 1
    for record in spy.records:
        changed, whole = shares(spy, record, demo_tokens.cond)
        on, off = cells(side, record.grid)
        assert on.any()
        assert off.any()
        assert difference(changed[:, on], whole[:, on]) < EXACT
        assert float(changed[:, off].abs().max()) < EXACT
        assert float(whole[:, off].abs().amax(-1).min()) > 10 * EXACT, "nothing to be masked"


@pytest.mark.parametrize("shape", [(100, 100), (30, 200), (7, 5), (2000, 16)])
def test_a_mask_of_another_shape_is_stretched_to_the_picture(
    pack: Pack,
    demo: Any,
    demo_easyref: Any,
    demo_tokens: Any,
    text: Any,
    shape: tuple[int, int],
) -> None:
    spy = Spy(pack, demo_easyref, demo.model)
    mask = half("top", *shape)
    model = apply(pack, demo.model, demo_easyref, demo_tokens, mask=mask)
    predict(spy.watch(model), x=latents(1, 24, 40), positive=text)
    for record in spy.records:
        changed, whole = shares(spy, record, demo_tokens.cond)
        changed, whole = (share.unflatten(1, record.grid) for share in (changed, whole))
        assert difference(changed[:, 0], whole[:, 0]) < EXACT
        assert float(changed[:, -1].abs().max()) < EXACT


def test_a_grey_mask_scales_the_references(
    pack: Pack, demo: Any, demo_easyref: Any, demo_tokens: Any, text: Any
) -> None:
    spy = Spy(pack, demo_easyref, demo.model)
    mask = torch.full((1, 64, 64), 0.25)
    model = apply(pack, demo.model, demo_easyref, demo_tokens, mask=mask, weight=2.0)
    predict(spy.watch(model), positive=text)
    assert spy.max_error([(text[0][0], demo_tokens.cond)], 0.5) < EXACT


def test_values_beyond_black_and_white_are_black_and_white(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    mask = half("left", 64, 64)
    beyond = apply(pack, unet, easyref, tokens, mask=mask * 9 - 4)
    assert torch.equal(predict(beyond), predict(apply(pack, unet, easyref, tokens, mask=mask)))


@pytest.mark.parametrize("width", [128, 6])
def test_a_line_thinner_than_a_cell_is_not_lost(
    pack: Pack, demo: Any, demo_easyref: Any, demo_tokens: Any, text: Any, width: int
) -> None:
    """Not even where the mask is narrower than the layer, and so grows the other way."""
    mask = torch.zeros(1, 128, width)
    mask[:, 77] = 1
    spy = Spy(pack, demo_easyref, demo.model)
    model = apply(pack, demo.model, demo_easyref, demo_tokens, mask=mask)
    predict(spy.watch(model), positive=text)

    def share_of_the_cell(record: LayerRecord) -> torch.Tensor:
        height = record.grid[0]
        rows = torch.zeros(height)
        rows[77 * height // 128] = height / 128
        return rows[:, None].expand(record.grid).reshape(1, -1, 1)

    assert spy.max_error([(text[0][0], demo_tokens.cond)], share_of_the_cell) < EXACT


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_white_mask_is_none_and_a_black_one_is_weight_zero(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, size: tuple[int, int]
) -> None:
    def run(**settings: Any) -> torch.Tensor:
        return predict(apply(pack, unet, easyref, tokens, **settings), CFG, latents(1, *size))

    everywhere, nowhere = run(), run(weight=0.0)
    assert difference(run(mask=torch.ones(1, 64, 96)), everywhere) < CLOSE
    assert difference(run(mask=torch.zeros(1, 64, 96)), nowhere) < CLOSE
    assert difference(everywhere, nowhere) > 0.1


def test_masks_of_two_apply_nodes_divide_the_picture(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Complementary masks with the same tokens are those tokens everywhere."""
    model = apply(pack, unet, easyref, tokens, mask=half("left", 128, 128))
    model = apply(pack, model, easyref, tokens, mask=half("right", 128, 128))
    everywhere = predict(apply(pack, unet, easyref, tokens), CFG)
    assert difference(predict(model, CFG), everywhere) < CLOSE


def test_a_batch_of_masks_is_one_a_latent(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> None:
    masks = torch.cat([half(side, 128, 128) for side in ("left", "top", "right")])
    x = latents(3)
    together = predict(apply(pack, unet, easyref, tokens, mask=masks), CFG, x)
    for number in range(3):
        own = slice(number, number + 1)
        alone = predict(apply(pack, unet, easyref, tokens, mask=masks[own]), CFG, x[own])
        assert difference(together[own], alone) < CLOSE
    assert difference(predict(apply(pack, unet, easyref, tokens), CFG, x), together) > 0.1


def test_masks_and_token_groups_of_a_batch_go_together(pack: Pack, unet: Any, easyref: Any) -> None:
    groups = [random_tokens(pack, easyref, seed) for seed in (1, 2)]
    both = pack.part("easyref_core.tokens.reference_tokens").stack_tokens(groups)
    masks = torch.cat([half("left", 64, 64), half("right", 64, 64)])
    x = latents(2)
    together = predict(apply(pack, unet, easyref, both, mask=masks), CFG, x)
    for number, group in enumerate(groups):
        own = slice(number, number + 1)
        alone = predict(apply(pack, unet, easyref, group, mask=masks[own]), CFG, x[own])
        assert difference(together[own], alone) < CLOSE


def test_another_number_of_masks_than_latents_is_refused(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    model = apply(pack, unet, easyref, tokens, mask=torch.ones(3, 64, 64))
    with pack.refused("batch of 3", "2 latents"):
        predict(model, CFG, latents(2))


def test_a_flat_mask_is_one_mask(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> None:
    mask = half("left", 128, 128)
    flat = predict(apply(pack, unet, easyref, tokens, mask=mask[0]), CFG)
    assert torch.equal(flat, predict(apply(pack, unet, easyref, tokens, mask=mask), CFG))


def test_a_mask_with_one_channel_is_a_mask(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    mask = torch.cat((half("left", 128, 128), half("top", 128, 128)))
    x = latents(2)
    result = predict(apply(pack, unet, easyref, tokens, mask=mask[:, None]), CFG, x)
    assert torch.equal(result, predict(apply(pack, unet, easyref, tokens, mask=mask), CFG, x))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.full((1, 8, 8), float("nan")), "not numbers"),
        (torch.ones(1, 0, 8), "[1, 0, 8]"),
        (torch.ones(1, 3, 8, 8), "[1, 3, 8, 8]"),
    ],
)
def test_what_is_no_mask_is_refused_at_the_node(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, mask: torch.Tensor, said: str
) -> None:
    with pack.refused("mask", said):
        apply(pack, unet, easyref, tokens, mask=mask)


def test_one_mask_serves_several_sizes_and_runs(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """A mask's cache of one run must not leak into the sizes of the next."""
    mask = half("left", 96, 96)
    model = apply(pack, unet, easyref, tokens, mask=mask)
    for size in [(16, 16), (8, 32), (32, 8), (16, 16)]:
        x = latents(1, *size)
        fresh = apply(pack, unet, easyref, tokens, mask=mask.clone())
        assert torch.equal(predict(model, CFG, x), predict(fresh, CFG, x))
