"""Stages: where their boundaries lie for every sampler and scheduler, and how they fade."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, euler, guider, latents, predict, sigmas, text
from device_waits import waits
from goldens import difference

CFG = 3.0
STEPS = 8
START, END = 0.1, 0.8


@pytest.fixture
def window(pack: Pack) -> Callable[..., Any]:
    return pack.part("nodes.sampling.stage_window").StageWindow


@dataclass
class OneLayer:
    """Stands in for the UNet's forward: a single cross-attention layer, which is faster.

    Attributes:
        calls: sigma of each model call, and whether the references changed the layer's output.
    """

    block: tuple[str, int, int]
    width: int
    heads: int = 2
    calls: list[tuple[float, bool]] = field(default_factory=list)

    def __call__(
        self, x: torch.Tensor, t: Any, context: torch.Tensor, transformer_options: Any, **_: Any
    ) -> torch.Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        sigmas = transformer_options["sigmas"]
        assert sigmas.unique().numel() == 1
        q = x.flatten(2).mT.repeat(1, 1, self.width // 4)
        k = context[..., :1].expand(-1, -1, self.width)
        slot = transformer_options["patches_replace"]["attn2"][self.block]
        options = {**transformer_options, "n_heads": self.heads}
        text = optimized_attention(q, k, k, self.heads)
        self.calls.append((float(sigmas[0]), not torch.equal(slot(q, k, k, options), text)))
        return x * 0.1


@pytest.fixture
def layer(pack: Pack, unet: Any, monkeypatch: pytest.MonkeyPatch) -> OneLayer:
    layers = pack.part("nodes.host.unet_layers").cross_attention_layers(unet)
    found = next(iter(layers.values()))
    layer = OneLayer(found.block, found.widths[0])
    monkeypatch.setattr(unet.model.diffusion_model, "forward", layer)
    return layer


def run(model: Any, sampler: str, scheduler: str, denoise: float) -> None:
    """As KSampler does, from noise or, with less than full denoise, from a picture."""
    import comfy.samplers

    device, options = model.load_device, model.model_options
    sampler = comfy.samplers.KSampler(model, STEPS, device, sampler, scheduler, denoise, options)
    picture = latents(1, 8, 8, seed=9) * 0.1
    given = (latents(1, 8, 8), text(), text("negative"), CFG, picture)
    sampler.sample(*given, disable_pbar=True, seed=5)


@pytest.mark.filterwarnings("ignore:Should have t")  # torchsde's, of rounding
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # ComfyUI's
@pytest.mark.filterwarnings("ignore:Should have tb<=t1")  # of a sampler's noise
@pytest.mark.parametrize("denoise", [1.0, 0.75])
def test_boundaries_are_exact_for_every_sampler_and_scheduler(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, window: Any, layer: OneLayer, denoise: float
) -> None:
    """By the sigmas that the model is called with, which samplers choose freely."""
    from comfy.samplers import SAMPLER_NAMES, SCHEDULER_NAMES

    sampling = unet.get_model_object("model_sampling")
    model = apply(pack, unet, easyref, tokens, curve=window(START, END))
    first, last = (torch.tensor(sampling.percent_to_sigma(place)) for place in (START, END))
    runs = [(sampler, "normal") for sampler in SAMPLER_NAMES]
    runs += [("euler", scheduler) for scheduler in SCHEDULER_NAMES]
    assert len(runs) >= 50
    for names in runs:
        layer.calls.clear()
        run(model, *names, denoise)
        for sigma, acts in layer.calls:
            assert acts == bool(last <= torch.tensor(sigma) <= first), (names, sigma)
        assert {acts for _, acts in layer.calls} == {True, False}, names


SCHEDULES = [
    "ModelSamplingDiscrete",
    "ModelSamplingContinuousEDM",
    "ModelSamplingContinuousV",
    "ModelSamplingDiscreteFlow",
    "ModelSamplingFlux",
    "StableCascadeSampling",
]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_window_acts_where_comfyuis_percent_says_to_the_last_bit(window: Any, kind: str) -> None:
    import comfy.model_sampling as kinds

    sampling = getattr(kinds, kind)()
    places = [k / 50 for k in range(51)]
    sigmas = torch.tensor([float(sampling.percent_to_sigma(place)) for place in places])
    around = torch.cat([sigmas, sigmas.nextafter(sigmas + 1), sigmas.nextafter(sigmas - 1)])
    around = around[(around >= 0) & (around <= sigmas[0])]
    for start, end in ((0.0, 0.36), (0.14, 1.0), (0.14, 0.36), (0.0, 1.0)):
        bounds = (float(sampling.percent_to_sigma(place)) for place in (start, end))
        first, last = (torch.tensor(bound) for bound in bounds)
        within = (around <= first) & (around >= last)
        for weight in (1.0, -0.5):
            found = window(start, end, weight).at_sigmas(sampling, around)
            expected = within * weight
            assert torch.equal(torch.as_tensor(found) * torch.ones(len(around)), expected)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("fade", [0.1, 0.4])
def test_stages_that_hand_over_keep_their_weight_in_every_schedule(
    window: Any, kind: str, fade: float
) -> None:
    import comfy.model_sampling as kinds

    sampling = getattr(kinds, kind)()
    places = [0.001, *(k / 40 for k in range(1, 40)), 0.999]
    sigmas = torch.tensor([float(sampling.percent_to_sigma(place)) for place in places])
    tokens, identity = window(0.0, 0.3, 0.8, fade), window(0.3, 1.0, 0.8, fade)
    found = [stage.at_sigmas(sampling, sigmas) for stage in (tokens, identity)]
    assert difference(sum(found), torch.full((len(places),), 0.8)) < 1e-5
    expected = torch.tensor([tokens.at(place) for place in places])
    assert difference(found[0], expected) < 5e-3
    for factors, outside, after in (
        (found[0], 0.3 + fade / 2, True),
        (found[1], 0.3 - fade / 2, False),
    ):
        for place, factor in zip(places, factors.tolist(), strict=True):
            if (place > outside) == after and abs(place - outside) > 1e-3:
                assert factor == 0


def test_a_window_that_acts_nowhere_is_skipped(window: Any) -> None:
    for empty in (window(0.3, 0.3), window(0.1, 0.9, 0.0), window(0.3, 0.3, 1.0, 0.2)):
        assert empty.is_zero
    assert not window(0.3, 0.31).is_zero


def stages(pack: Pack, **settings: Any) -> tuple[Any, Any]:
    """The node's outputs with its defaults, save for `settings`."""
    node = pack.nodes["EasyRefStages"]
    inputs = node.GET_SCHEMA().inputs
    return node.execute(**({i.id: i.default for i in inputs} | settings)).result


def test_the_node_gives_a_presets_windows_or_its_own(pack: Pack) -> None:
    tokens, identity = stages(pack, preset="steps", tokens_end=0.9)
    assert (tokens.start, tokens.end, identity.start, identity.end) == (0.0, 0.36, 0.14, 1.0)
    tokens, identity = stages(pack, preset="noise", tokens_weight=0.5, cross_fade=0.1)
    assert (tokens.end, tokens.weight, tokens.fade) == (0.18, 0.5, 0.1)
    assert (identity.start, identity.weight, identity.fade) == (0.0, 1.0, 0.1)
    given = {"tokens_start": 0.1, "tokens_end": 0.4, "identity_start": 0.2, "identity_end": 0.9}
    tokens, identity = stages(pack, preset="custom", **given, identity_weight=0.7)
    assert (tokens.start, tokens.end, tokens.weight) == (0.1, 0.4, 1.0)
    assert (identity.start, identity.end, identity.weight) == (0.2, 0.9, 0.7)


def test_a_custom_start_after_its_end_is_refused(pack: Pack) -> None:
    for name in ("tokens", "identity"):
        wrong = {f"{name}_start": 0.6, f"{name}_end": 0.4}
        with pack.refused(f"{name}_start (0.6) is after {name}_end (0.4)", "Swap them"):
            stages(pack, preset="custom", **wrong)
        stages(pack, preset="steps", **wrong)  # not used there


def test_the_page_gets_the_presets_windows(pack: Pack) -> None:
    preset = pack.nodes["EasyRefStages"].GET_NODE_INFO_V1()["input"]["required"]["preset"][1]
    for name, boundaries in preset["windows"].items():
        tokens, identity = stages(pack, preset=name)
        custom = stages(pack, preset="custom", **boundaries)
        assert (tokens, identity) == custom
    assert ["custom", *preset["windows"]] == preset["options"]


def test_a_stage_is_the_apply_nodes_own_window_times_its_weight(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    first, _ = stages(pack, preset="steps", tokens_weight=0.5)
    staged = apply(pack, unet, easyref, tokens, weight=0.8, curve=first)
    plain = apply(pack, unet, easyref, tokens, weight=0.4, end_percent=0.36)
    for timestep in (801.0, 661.0, 619.0, 301.0):
        found, expected = (predict(model, CFG, timestep=timestep) for model in (staged, plain))
        assert difference(found, expected) < 1e-6


def test_a_step_with_stages_never_waits_for_the_device(
    pack: Pack, comfyui: Path, unet: Any, fresh_easyref: Any, tokens: Any
) -> None:
    model = unet
    for fade in (0.0, 0.2):
        staged, _ = stages(pack, cross_fade=fade, tokens_weight=0.7)
        model = apply(pack, model, fresh_easyref, tokens, curve=staged)
    steps = sigmas(model, 901.0, 601.0, 301.0)
    euler(guider(model, CFG), latents(2) * 14, steps)
    with waits(comfyui) as result:
        euler(guider(model, CFG), latents(2) * 14, steps)
    assert not result
