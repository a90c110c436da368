"""What regions cost: queries under their masks, and keys and values once for each tokens."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, latents, predict, random_text, random_tokens
from goldens import difference
from region_nodes import LEFT, RIGHT, box, regions

CFG = 5.0


@pytest.fixture
def texts() -> dict[str, Any]:
    return {"positive": random_text(1, pooled=64), "negative": random_text(2, pooled=64)}


@pytest.fixture
def groups(pack: Pack, demo_easyref: Any) -> list[Any]:
    return [random_tokens(pack, demo_easyref, seed) for seed in (1, 2, 3)]


@pytest.fixture
def attended(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows x positions, tokens) of every attention over reference tokens."""
    layer = pack.part("nodes.sampling.layer")
    attend, result = layer.reference_attention, []

    def noted(q: Any, k: Any, *args: Any) -> Any:
        result.append((q.shape[0] * q.shape[2], k.shape[2]))
        return attend(q, k, *args)

    monkeypatch.setattr(layer, "reference_attention", noted)
    return result


def tiles(pack: Pack, easyref: Any) -> list[tuple[Any, torch.Tensor, dict[str, Any]]]:
    """Sixteen regions that cover the picture once."""
    return [
        (
            random_tokens(pack, easyref, seed=number),
            box(*(part / 4 for part in (row, row + 1, column, column + 1))),
            {},
        )
        for number, (row, column) in enumerate((r, c) for r in range(4) for c in range(4))
    ]


def test_a_region_attends_only_with_the_queries_under_its_mask(
    pack: Pack,
    demo: Any,
    demo_easyref: Any,
    groups: list[Any],
    texts: dict[str, Any],
    attended: list[tuple[int, int]],
) -> None:
    x = latents(1, 32, 32)
    predict(apply(pack, demo.model, demo_easyref, groups[0]), CFG, x, **texts)
    whole = sum(queries for queries, _ in attended)
    for given, share in (
        ([(groups[0], box(0, 0.25, 0, 0.25), {})], 1 / 16),
        ([(groups[0], LEFT, {}), (groups[1], RIGHT, {})], 1.0),
        ([(groups[0], box(0, 0.5, 0, 0.5), {}), (groups[1], LEFT, {})], 3 / 4),
        (tiles(pack, demo_easyref), 1.0),
    ):
        attended.clear()
        model = apply(pack, demo.model, demo_easyref, None, regions=regions(pack, *given))
        predict(model, CFG, x, **texts)
        assert sum(queries for queries, _ in attended) == whole * share


def test_sixteen_small_regions_cost_as_much_as_one_apply_node(
    pack: Pack, demo: Any, demo_easyref: Any, texts: dict[str, Any], attended: list[tuple[int, int]]
) -> None:
    given = tiles(pack, demo_easyref)
    small = apply(pack, demo.model, demo_easyref, None, regions=regions(pack, *given))
    full = demo.model
    for tokens, mask, _ in given:
        # Masks of two latents are not gathered, so this is what every one would cost in full.
        full = apply(pack, full, demo_easyref, tokens, mask=mask.expand(2, -1, -1))
    x = latents(2, 32, 32)
    work, results = {}, {}
    for name, model in (("regions", small), ("apply nodes", full)):
        attended.clear()
        results[name] = predict(model, 1.0, x, **texts)
        work[name] = sum(queries * tokens for queries, tokens in attended)
    assert difference(results["regions"], results["apply nodes"]) < 5e-4
    assert work["regions"] * 16 == work["apply nodes"]


def test_sixteen_small_regions_take_less_time_than_sixteen_apply_nodes(pack: Pack) -> None:
    """Measured in one layer of SDXL's width, since a tiny model spends its time elsewhere."""
    core = pack.part("easyref_core.adapter.attention")
    attend = torch.nn.functional.scaled_dot_product_attention
    heads, positions, width = 10, 1024, 640
    noise = torch.Generator().manual_seed(1)
    query = torch.randn(1, positions, width, generator=noise)
    keys = torch.randn(16, 2, 1, 64, width, generator=noise)

    def shares(small: bool) -> list[Any]:
        places = torch.arange(positions).chunk(16)
        whole = torch.zeros(16, 1, positions, 1, 1)
        for own, place in zip(whole, places, strict=True):
            own[:, place] = 1
        return [
            core.ReferenceShare(*keys[n], 1.0, None, places[n])
            if small
            else core.ReferenceShare(*keys[n], whole[n])
            for n in range(16)
        ]

    seconds, results = {}, {}
    for small in (True, False):
        given, taken = shares(small), []
        for _ in range(3):
            start = time.process_time()
            results[small] = core.add_shares(query, query, given, heads, attend)
            taken.append(time.process_time() - start)
        seconds[small] = min(taken)
    assert difference(results[True], results[False]) < 1e-5
    assert seconds[True] < seconds[False] / 3


def test_an_empty_region_costs_nothing(
    pack: Pack,
    demo: Any,
    demo_easyref: Any,
    groups: list[Any],
    texts: dict[str, Any],
    attended: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = pack.part("nodes.host.key_value_cache")
    monkeypatch.setattr(store, "project_tokens", lambda *args: pytest.fail("computed"))
    for given in (
        (groups[0], torch.zeros(1, 8, 8), {}),
        (groups[0], LEFT, {"weight": 0.0}),
    ):
        model = apply(pack, demo.model, demo_easyref, None, regions=regions(pack, given))
        nothing = apply(pack, demo.model, demo_easyref, groups[1], weight=0.0)
        assert torch.equal(predict(model, CFG, **texts), predict(nothing, CFG, **texts))
    assert attended == []


def test_keys_and_values_of_regions_are_computed_once_for_each_tokens(
    pack: Pack,
    demo: Any,
    demo_easyref: Any,
    groups: list[Any],
    texts: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = pack.part("nodes.host.key_value_cache")
    project, computed = store.project_tokens, []

    def noted(checkpoint: Any, tokens: Any, *args: Any) -> Any:
        computed.append(tokens)
        return project(checkpoint, tokens, *args)

    monkeypatch.setattr(store, "project_tokens", noted)
    given = regions(
        pack, (groups[0], LEFT, {}), (groups[0], RIGHT, {"weight": 0.5}), (groups[1], LEFT, {})
    )
    model = apply(pack, demo.model, demo_easyref, groups[1], regions=given)
    for seed in (1, 2):
        predict(model, CFG, latents(1, seed=seed), **texts)
    assert sorted(map(id, computed)) == sorted(map(id, groups[:2]))
