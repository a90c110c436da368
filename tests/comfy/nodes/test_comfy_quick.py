"""EasyRef Quick is EasyRef Encode and EasyRef Apply with their defaults, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, latents, predict, random_text
from goldens import pictures, user_prompt

CASE = "four_refs_prompt"


@pytest.fixture
def references(pack: Pack) -> Any:
    group = pack.part("easyref_core.encode.group").Reference
    return tuple(group(picture) for picture in pictures(CASE)[:2])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand((1, 40, 60, 3), generator=torch.Generator().manual_seed(4))


def encoded(pack: Pack, easyref: Any, **settings: Any) -> Any:
    given = {"prompt": user_prompt(CASE), "aggregation": "easyref", "image_size": 0}
    return pack.run("EasyRefEncode", easyref, **(given | settings))


@pytest.mark.parametrize("weight", [1.0, 0.6, -0.5, 0.0])
@pytest.mark.parametrize("given", [("images",), ("references",), ("images", "references")])
def test_it_is_the_two_nodes_in_a_row(
    pack: Pack,
    unet: Any,
    easyref: Any,
    references: Any,
    image: torch.Tensor,
    weight: float,
    given: tuple[str, ...],
) -> None:
    chosen = {n: v for n, v in (("images", image), ("references", references)) if n in given}
    steered = pack.run(
        "EasyRefQuick", unet, easyref, prompt=user_prompt(CASE), weight=weight, **chosen
    )
    apart = apply(pack, unet, easyref, encoded(pack, easyref, **chosen), weight=weight)
    assert torch.equal(predict(steered, cfg=4.0), predict(apart, cfg=4.0))
    assert not torch.equal(predict(steered, cfg=4.0), predict(unet, cfg=4.0))


def test_it_runs_on_the_demo_models(
    pack: Pack, demo: Any, demo_easyref: Any, image: torch.Tensor
) -> None:
    steered = pack.run("EasyRefQuick", demo.model, demo_easyref, "a star", 1.0, images=image)
    texts = {"positive": random_text(1, pooled=64), "negative": random_text(2, pooled=64)}
    result = predict(steered, cfg=4.0, x=latents(), **texts)
    assert result.isfinite().all()
    assert not torch.equal(result, predict(demo.model, cfg=4.0, x=latents(), **texts))


def test_without_a_picture_it_is_refused(pack: Pack, unet: Any, easyref: Any) -> None:
    with pack.refused("There is no reference picture", "images or references"):
        pack.run("EasyRefQuick", unet, easyref, "a cat", 1.0)
