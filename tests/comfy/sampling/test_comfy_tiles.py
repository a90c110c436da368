"""Tiled sampling, where another node cuts the latents of a model call into tiles.

MultiDiffusion, as in ComfyUI-TiledDiffusion, calls the model with several tiles at once and leaves
ComfyUI's notes about the rows as they were.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import Pack, apply, latents, predict, random_tokens
from goldens import difference

CFG = 5.0
# Predictions of up to 8, guided: the UNet alone, without any references, differs by up to 2e-5 when
# it is given several tiles at once, as sums are then rounded in another order.
EXACT = 5e-5
TILE = 16


def tiled(model: Any, at_once: int, order: str = "tile by tile") -> Any:
    """The model with a wrapper that samples the width in tiles, so many in one call."""
    model = model.clone()

    def by_row(tensor: torch.Tensor, rows: int) -> torch.Tensor:
        """After each row of a tile the same row of the next tile."""
        return tensor.unflatten(0, (-1, rows)).transpose(0, 1).flatten(0, 1)

    def sample(apply_model: Any, args: Any) -> torch.Tensor:
        x, rows = args["input"], args["input"].shape[0]
        tiles = x.split(TILE, dim=-1)
        done: list[torch.Tensor] = []
        for first in range(0, len(tiles), at_once):
            some = tiles[first : first + at_once]

            def spread(tensor: Any, times: int = len(some)) -> Any:
                if not isinstance(tensor, torch.Tensor):
                    return tensor
                tensor = torch.cat([tensor] * times)
                return by_row(tensor, rows) if order == "row by row" else tensor

            batch = torch.cat(some)
            batch = by_row(batch, rows) if order == "row by row" else batch
            details = {name: spread(value) for name, value in args["c"].items()}
            out = apply_model(batch, spread(args["timestep"]), **details)
            if order == "row by row":
                out = by_row(out, len(some))
            done += out.split(rows)
        return torch.cat(done, dim=-1)

    model.set_model_unet_function_wrapper(sample)
    return model


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_tiles_in_one_call_get_what_tiles_one_by_one_get(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, at_once: int
) -> None:
    model = apply(pack, unet, easyref, tokens, lora_strength=0.0)
    x = latents(1, 16, 4 * TILE)
    alone = predict(tiled(model, 1), CFG, x)
    assert difference(alone, predict(tiled(model, at_once), CFG, x)) < EXACT
    assert difference(alone, predict(tiled(unet, at_once), CFG, x)) > 0.1


def test_each_row_of_a_tile_gets_the_tokens_of_its_text(
    pack: Pack, spy: Spy, model: Any, truth: Any
) -> None:
    predict(tiled(model, 2), CFG, latents(1, 16, 2 * TILE))
    assert sorted(spy.texts(*(states for states, _ in truth))[0]) == [0, 0, 1, 1]
    assert spy.max_error(truth) < EXACT


def test_tiles_of_a_batch_keep_each_latents_own_tokens(pack: Pack, unet: Any, easyref: Any) -> None:
    groups = random_tokens(pack, easyref, seed=2, batch=2)
    model = apply(pack, unet, easyref, groups, lora_strength=0.0)
    x = latents(2, 16, 2 * TILE)
    assert difference(predict(tiled(model, 1), CFG, x), predict(tiled(model, 2), CFG, x)) < EXACT


def test_tiles_in_another_row_order_get_no_references_and_one_warning(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The texts tell that the rows have another order."""
    pack.part("nodes.sampling.batch_rows").warn_of_rows.cache_clear()
    model = apply(pack, unet, easyref, tokens, lora_strength=0.0)
    x = latents(1, 16, 2 * TILE)
    with caplog.at_level(logging.WARNING):
        result = predict(tiled(model, 2, "row by row"), CFG, x)
    assert difference(result, predict(tiled(unet, 2), CFG, x)) < EXACT
    assert [r.getMessage().count("left out") for r in caplog.records] == [1]


@pytest.mark.parametrize("at_once", [1, 2])
def test_references_with_a_mask_are_left_out_of_tiles_with_one_warning(
    pack: Pack,
    unet: Any,
    easyref: Any,
    tokens: Any,
    at_once: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing says which part of the picture a tile is. What acts everywhere acts there too."""
    pack.part("nodes.sampling.model_call").warn_of_tiles.cache_clear()
    x = latents(1, 16, 2 * TILE)
    mask = torch.zeros(1, 8, 16)
    mask[..., :8] = 1
    everywhere = apply(pack, unet, easyref, tokens, lora_strength=0.0)
    part = random_tokens(pack, easyref, seed=4)
    both = apply(pack, everywhere, easyref, part, lora_strength=0.0, mask=mask)
    with caplog.at_level(logging.WARNING):
        result = predict(tiled(both, at_once), CFG, x)
    assert difference(result, predict(tiled(everywhere, at_once), CFG, x)) < EXACT
    assert [r.getMessage().count("in tiles") for r in caplog.records] == [1]
    assert difference(predict(both, CFG, x), predict(everywhere, CFG, x)) > 0.01
