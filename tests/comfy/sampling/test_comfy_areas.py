"""Texts with areas and masks of their own, and what becomes of a reference mask in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import LayerRecord, Spy
from comfyhost import (
    Pack,
    apply,
    area,
    combine,
    latents,
    predict,
    random_text,
    stock,
    text,
)

CFG = 5.0
EXACT = 1e-5

Truth = list[tuple[torch.Tensor, torch.Tensor]]


LEFT, RIGHT = (0.5, 1.0, 0.0, 0.0), (0.5, 1.0, 0.5, 0.0)
CORNER, INNER = (0.75, 0.75, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0)


@pytest.mark.parametrize(
    "layout",
    [
        "positive areas beside the whole",
        "positive areas alone",
        "areas on both sides",
        "a positive area in a negative one",
        "a negative area in a positive one",
    ],
)
def test_areas_and_the_counterparts_that_comfyui_copies(
    spy: Spy, model: Any, truth: Truth, tokens: Any, layout: str
) -> None:
    """ComfyUI copies an area's conditioning, its uuid too, into the other side's list."""
    more, less = random_text(1), random_text(2)
    positive, negative = {
        "positive areas beside the whole": (combine(text(), area(more, LEFT)), text("negative")),
        "positive areas alone": (
            combine(area(text(), LEFT), area(more, RIGHT)),
            text("negative"),
        ),
        "areas on both sides": (
            combine(text(), area(more, LEFT)),
            combine(text("negative"), area(less, RIGHT)),
        ),
        "a positive area in a negative one": (
            combine(area(more, INNER), text()),
            area(text("negative"), CORNER),
        ),
        "a negative area in a positive one": (
            area(text(), CORNER),
            combine(area(less, INNER), text("negative")),
        ),
    }[layout]
    predict(model, CFG, latents(1, 24, 24), positive=positive, negative=negative)
    truth = [*truth, (more[0][0], tokens.cond), (less[0][0], tokens.uncond)]
    result = {n for call in spy.texts(*(t for t, _ in truth)) for n in call}
    assert result >= {0, 1}
    assert len({record.grid for record in spy.records}) > 1, "no area was cut"
    assert spy.max_error(truth) < EXACT


def test_masked_texts(spy: Spy, model: Any, truth: Truth, tokens: Any) -> None:
    more = random_text(1)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    for bounds in ("default", "mask bounds"):
        masked = stock("nodes.ConditioningSetMask", more, mask, bounds, 0.7)
        predict(model, CFG, latents(1, 24, 24), positive=combine(text(), masked))
    truth = [*truth, (more[0][0], tokens.cond)]
    assert len({record.grid for record in spy.records}) > 1, "no area was cut"
    assert spy.max_error(truth) < EXACT


HEIGHT, WIDTH = 24, 48  # of the latent; the golden UNet's attention has half as many


def right_third(parts: list[tuple[torch.Tensor, tuple[float, ...]]]) -> Any:
    """Scale of a mask whose right third is white, for rows whose text has an area of its own.

    All sizes here are multiples of what the UNet shrinks by, so every cell is 0 or 1.
    """

    def scale(record: LayerRecord) -> torch.Tensor:
        height, width = record.grid
        rows = []
        for context in record.context:
            own = [part for states, part in parts if torch.equal(states[0], context)]
            left = round(own[0][2] * WIDTH / 2) if own else 0
            columns = (torch.arange(width) + left >= WIDTH // 3).float()
            rows.append(columns.expand(height, width).reshape(-1, 1))
        return torch.stack(rows)

    return scale


@pytest.mark.parametrize("part", [LEFT, RIGHT, (1.0, 0.5, 0.0, 0.5), (0.5, 0.5, 0.25, 0.25)])
@pytest.mark.parametrize("finer", [1, 4])
def test_a_reference_mask_is_cut_to_the_area_where_it_lies(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, part: tuple[float, ...], finer: int
) -> None:
    more = random_text(1)
    mask = torch.zeros(1, HEIGHT * finer, WIDTH * finer)
    mask[:, :, WIDTH * finer * 2 // 3 :] = 1
    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens, mask=mask))
    positive = combine(text(), area(more, part))
    predict(model, x=latents(1, HEIGHT, WIDTH), positive=positive)
    assert len({record.grid for record in spy.records}) == 2
    truth = [(text()[0][0], tokens.cond), (more[0][0], tokens.cond)]
    assert spy.max_error(truth, right_third([(more[0][0], part)])) < EXACT


def test_two_areas_of_one_size_get_their_own_parts_of_a_mask(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    left, right = random_text(1), random_text(2)
    mask = torch.zeros(1, 2 * HEIGHT, 2 * WIDTH)
    mask[:, :, WIDTH * 4 // 3 :] = 1
    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens, mask=mask))
    positive = combine(area(left, LEFT), area(right, RIGHT))
    predict(model, x=latents(1, HEIGHT, WIDTH), positive=positive)
    truth = [(left[0][0], tokens.cond), (right[0][0], tokens.cond)]
    parts = [(left[0][0], LEFT), (right[0][0], RIGHT)]
    assert spy.max_error(truth, right_third(parts)) < EXACT


def test_the_same_area_of_a_larger_picture_gets_another_part_of_a_mask(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """A mask's cache of one run must not leak into the next."""
    mask = torch.rand(1, 64, 64)
    corner = stock("nodes.ConditioningSetArea", random_text(1), 128, 128, 0, 0, 1.0)
    positive = combine(text(), corner)
    model = apply(pack, unet, easyref, tokens, mask=mask)
    for size in ((24, 24), (24, 48), (48, 24)):
        x = latents(1, *size)
        fresh = apply(pack, unet, easyref, tokens, mask=mask.clone())
        result = predict(model, CFG, x, positive=positive)
        assert torch.equal(result, predict(fresh, CFG, x, positive=positive))
