"""How many operations an attention layer gets for its references, views included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, latents, predict, random_text, random_tokens
from region_nodes import box, regions
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = ("aten.cat.default", "aten.clone.default", "aten._to_copy.default", "aten.to.dtype")


class Operations(TorchDispatchMode):
    """Notes the names of operations while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.on:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operations(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Names of the operations of each layer in one model call, those of the text left out."""
    module = pack.part("nodes.sampling.layer")
    texts = {"positive": random_text(1, pooled=64), "negative": random_text(2, pooled=64)}
    noted, layers = Operations(), []
    text, call = module.optimized_attention, module.ReferenceAttention.__call__

    def of_text(*args: Any, **kwargs: Any) -> torch.Tensor:
        noted.on = False
        try:
            return text(*args, **kwargs)
        finally:
            noted.on = True

    def of_layer(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        noted.names, noted.on = [], True
        try:
            return call(self, *args, **kwargs)
        finally:
            noted.on = False
            layers.append(noted.names)

    monkeypatch.setattr(module, "optimized_attention", of_text)
    monkeypatch.setattr(module.ReferenceAttention, "__call__", of_layer)

    def run(model: Any, batch: int = 1, cfg: float = 5.0) -> list[list[str]]:
        layers.clear()
        with noted:
            predict(model, cfg, latents(batch, 16, 16), **texts)
        return layers

    return run


@pytest.mark.parametrize(("batch", "cfg", "most"), [(1, 5.0, 10), (4, 5.0, 12), (1, 1.0, 12)])
@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_one_apply_takes_few_operations_and_copies_nothing(
    pack: Pack, demo: Any, demo_easyref: Any, operations: Any, batch: int, cfg: float, most: int,
    weight: float,
) -> None:  # fmt: skip
    tokens = random_tokens(pack, demo_easyref, 1)
    found = operations(apply(pack, demo.model, demo_easyref, tokens, weight=weight), batch, cfg)
    assert found
    for names in found:
        assert len(names) <= most, names
        assert not set(names) & set(COPIES)


def test_four_masked_regions_take_nine_operations_each_and_four_in_all(
    pack: Pack, demo: Any, demo_easyref: Any, operations: Any
) -> None:
    quarters = [box(y, y + 0.5, x, x + 0.5) for y in (0, 0.5) for x in (0, 0.5)]
    given = [(random_tokens(pack, demo_easyref, n), q, {}) for n, q in enumerate(quarters)]
    model = apply(pack, demo.model, demo_easyref, None, regions=regions(pack, *given))
    found = sorted(operations(model), key=len)
    # The first layer of each of two sizes computes the scales for the others.
    assert len(found) > 10
    for names in found[:-2]:
        assert len(names) <= 4 * 9 + 4, names
