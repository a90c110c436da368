"""Weight curves over the sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import (
    Pack,
    apply,
    euler,
    guider,
    latents,
    predict,
    random_tokens,
    sigmas,
)
from device_waits import waits
from goldens import difference

CFG = 5.0
CLOSE = 5e-5
STEPS = (901.0, 701.0, 501.0, 301.0, 101.0)


def node(pack: Pack, **settings: Any) -> Any:
    """The Weight Curve node with its defaults, save for `settings`."""
    inputs = pack.nodes["EasyRefWeightCurve"].GET_SCHEMA().inputs
    return pack.run("EasyRefWeightCurve", **({i.id: i.default for i in inputs} | settings))


def custom(pack: Pack, points: str, **settings: Any) -> Any:
    return node(pack, shape="custom points", points=points, **settings)


def test_the_node_gives_the_curve_of_its_inputs(pack: Pack) -> None:
    curve = node(pack, shape="ease in", start_value=0.2, end_value=1.0)
    assert curve.at(0.5) == pytest.approx(0.4)
    assert custom(pack, "0.3:2").points == ((0.3, 2.0),)
    with pack.refused("points:", "'half:2' is not a point"):
        custom(pack, "0:1, half:2")


@pytest.mark.parametrize(
    ("kind", "exact"),
    [
        ("ModelSamplingDiscrete", 2e-4),
        ("zsnr", 2e-4),
        ("ModelSamplingContinuousEDM", 2e-4),
        ("ModelSamplingContinuousV", 2e-4),
        ("ModelSamplingDiscreteFlow", 2e-3),
        ("ModelSamplingFlux", 2e-3),
        ("StableCascadeSampling", 2e-3),
    ],
)
def test_every_kind_of_schedule_gives_the_factor_of_comfyuis_percent(
    pack: Pack, kind: str, exact: float
) -> None:
    """On the device from sigmas alone, as the host computes it from percent."""
    import comfy.model_sampling as kinds

    sampling = kinds.ModelSamplingDiscrete(zsnr=True) if kind == "zsnr" else getattr(kinds, kind)()
    curve = custom(pack, "0.1:1, 0.37:-0.5, 0.61:2, 0.95:0.5")
    places = [0.001, *(k / 50 for k in range(1, 50)), 0.1234, 0.37, 0.61, 0.999]
    t = torch.tensor([float(sampling.percent_to_sigma(p)) for p in places])
    result = curve.at_sigmas(sampling, t)
    expected = torch.tensor([curve.at(p) for p in places])
    assert difference(result, expected) < exact


@pytest.mark.parametrize("settings", [{}, {"end_percent": 0.6}])
def test_the_curve_is_the_weight_step_by_step(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, settings: dict[str, float]
) -> None:
    curve = custom(pack, "0:0.2, 0.35:1.3, 0.9:-0.4")
    steps = sigmas(unet, *STEPS)
    x = latents(2) * torch.sqrt(steps[0] ** 2 + 1)
    curved = apply(pack, unet, easyref, tokens, curve=curve, weight=0.8, **settings)
    result = euler(guider(curved, CFG), x, steps)
    for number, timestep in enumerate(STEPS):
        place = 1 - timestep / 999
        weight = 0.8 * curve.at(place) if place <= settings.get("end_percent", 1) else 0.0
        model = apply(pack, unet, easyref, tokens, weight=weight)
        x = euler(guider(model, CFG), x, steps[number : number + 2])
    assert difference(result, x) < 1e-3


def test_a_constant_of_one_is_no_curve_and_another_is_a_weight(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    def run(**settings: Any) -> torch.Tensor:
        return predict(apply(pack, unet, easyref, tokens, **settings), CFG, latents(2))

    one, half = (custom(pack, f"0:{value}") for value in (1.0, 0.5))
    assert torch.equal(run(curve=one), run())
    assert torch.equal(run(curve=half), run(weight=0.5))
    level = custom(pack, "0:1, 1:1")
    assert torch.equal(run(curve=level), run())


def test_a_step_with_curves_regions_and_prompts_own_tokens_never_waits(
    pack: Pack, comfyui: Path, unet: Any, fresh_easyref: Any
) -> None:
    from comfyhost import text

    curve = node(pack, end_value=0.2)
    groups = [random_tokens(pack, fresh_easyref, seed) for seed in (1, 2, 3)]
    masks = [torch.zeros(1, 32, 32) for _ in range(2)]
    masks[0][:, :16, :9] = 1
    masks[1][:, 8:] = 0.5
    chain = None
    for group, mask in zip(groups, masks, strict=False):
        chain = pack.run("EasyRefRegion", group, mask, 0.7, curve=curve, previous=chain)
    model = apply(
        pack,
        unet,
        fresh_easyref,
        groups[2],
        regions=chain,
        curve=curve,
        normalise=True,
        start_percent=0.05,
    )
    positive = pack.run("EasyRefSetConditioning", text(), groups[0], 0.6)
    steps = sigmas(model, 901.0, 601.0, 301.0)
    x = latents(2) * 14
    euler(guider(model, CFG, positive), x, steps)
    with waits(comfyui) as result:
        euler(guider(model, CFG, positive), x, steps)
    assert not result
