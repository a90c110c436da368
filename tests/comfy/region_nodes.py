"""Region nodes and their masks, for tests."""

from __future__ import annotations

from typing import Any

import torch
from comfyhost import Pack


def box(top: float, bottom: float, left: float, right: float, cells: int = 64) -> torch.Tensor:
    """A mask that is white in a part of the picture."""
    mask = torch.zeros(1, cells, cells)
    rows = slice(round(top * cells), round(bottom * cells))
    mask[:, rows, round(left * cells) : round(right * cells)] = 1
    return mask


LEFT, RIGHT = box(0, 1, 0, 0.5), box(0, 1, 0.5, 1)


def regions(pack: Pack, *given: tuple[Any, torch.Tensor, dict[str, Any]]) -> tuple[Any, ...]:
    """Chained Region nodes of (tokens, mask, settings)."""
    chain = None
    for tokens, mask, settings in given:
        settings = {"weight": 1.0, **settings}
        chain = pack.run("EasyRefRegion", tokens, mask, previous=chain, **settings)
    assert chain is not None
    return chain
