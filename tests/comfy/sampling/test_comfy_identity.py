"""EasyRef Identity: when it reads the references, and where they act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyhost import Pack, euler, guider, latents, predict, sigmas
from goldens import difference
from identity_nodes import calls_of, identity, picture

CFG = 5.0
STEPS = 901.0, 701.0, 501.0, 301.0, 101.0


@pytest.fixture
def vae(demo: Any) -> Any:
    return demo.vae


def sample(model: Any, batch: int = 1, **settings: Any) -> torch.Tensor:
    steps = sigmas(model, *STEPS)
    x = latents(batch) * torch.sqrt(steps[0] ** 2 + 1)
    return euler(guider(model, CFG, **settings), x, steps)


def test_references_act(pack: Pack, unet: Any, vae: Any) -> None:
    plain = predict(unet, CFG)
    first, second = (predict(identity(pack, unet, vae, images=picture(n)), CFG) for n in (1, 2))
    assert difference(first, plain) > 0.01
    assert difference(first, second) > 0.01


def test_weight_zero_is_the_plain_model_to_the_bit_and_reads_nothing(
    pack: Pack, unet: Any, vae: Any
) -> None:
    plain = sample(unet)
    with calls_of(unet) as calls:
        result = sample(identity(pack, unet, vae, weight=0.0))
    assert torch.equal(result, plain)
    assert calls.rows == [2] * len(STEPS)
