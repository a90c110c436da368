"""A new kind of weight is one class; no other code changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import LayerRecord, Spy
from comfyhost import Pack, apply, golden, latents, predict, random_tokens, text
from goldens import difference

CFG = 5.0
EXACT = 2e-5


@pytest.fixture
def weights(pack: Pack) -> Any:
    return pack.part("nodes.sampling.weights")


def fade(weights: Any) -> Any:
    """A mask that is computed, not drawn: from 1 at the top to 0 at the bottom of the picture."""

    class Fade(weights.Weight):
        by_position = True

        def at_positions(self, grid: Any, batch: Any, like: torch.Tensor) -> Any:
            height, width = grid.size
            rows = torch.linspace(1, 0, height).to(like)
            return weights.PositionWeights(rows.repeat_interleave(width)[None, :, None])

    return Fade()


def high_noise_only(weights: Any, limit: float) -> Any:
    class HighNoise(weights.Weight):
        def at_sigmas(self, model_sampling: Any, sigmas: torch.Tensor) -> torch.Tensor:
            return sigmas > limit

    return HighNoise()


def max_error(spy: Spy, tokens: Any, scale: Any) -> float:
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    return spy.max_error(truth, scale)


def fading_down(record: LayerRecord) -> torch.Tensor:
    height, width = record.grid
    return torch.linspace(1, 0, height).repeat_interleave(width)[None, :, None]


def test_a_new_weight_by_position(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, weights: Any
) -> None:
    model = apply(pack, unet, easyref, tokens, weight=0.8, curve=fade(weights))
    predict(spy.watch(model), CFG)
    assert max_error(spy, tokens, lambda record: 0.8 * fading_down(record)) < EXACT


def test_a_new_weight_by_position_multiplies_with_a_mask_in_either_order(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, weights: Any
) -> None:
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    faded = fade(weights)
    inside = pack.run("EasyRefRegion", tokens, left, 1.0, curve=faded)
    first = apply(pack, unet, easyref, None, regions=inside)
    masked = pack.run("EasyRefRegion", tokens, left, 1.0)
    second = apply(pack, unet, easyref, None, regions=masked, curve=faded)

    def scale(record: LayerRecord) -> torch.Tensor:
        height, width = record.grid
        columns = (torch.arange(width) < width // 2).float().repeat(height)[None, :, None]
        return fading_down(record) * columns

    for model in (first, second):
        spy.records.clear()
        predict(spy.watch(model), CFG)
        assert max_error(spy, tokens, scale) < EXACT


def test_a_new_weight_by_noise_level(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, weights: Any
) -> None:
    sampling = unet.get_model_object("model_sampling")
    limit = float(sampling.sigma(torch.tensor([500.0]))[0])
    model = apply(pack, unet, easyref, tokens, curve=high_noise_only(weights, limit))
    always = apply(pack, unet, easyref, tokens)
    never = apply(pack, unet, easyref, tokens, weight=0.0)
    x = golden("unet.latents")
    for timestep, wanted in ((701.0, always), (301.0, never)):
        assert torch.equal(predict(model, CFG, x, timestep), predict(wanted, CFG, x, timestep))


def test_a_new_weight_that_is_zero_costs_nothing(
    pack: Pack,
    unet: Any,
    fresh_easyref: Any,
    weights: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Off(weights.Weight):
        is_zero = True

    cache = pack.part("nodes.host.key_value_cache")
    monkeypatch.setattr(cache, "project_tokens", lambda *args: pytest.fail("computed for nothing"))
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, unet, fresh_easyref, tokens, lora_strength=0.0, curve=Off())
    assert difference(predict(model, CFG, latents(2)), predict(unet, CFG, latents(2))) == 0.0
