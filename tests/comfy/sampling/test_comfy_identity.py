"""EasyRef Identity: when it reads the references, and where they act."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyhost import Pack, euler, gathered, guider, latents, predict, random_text, sigmas
from goldens import difference
from identity_nodes import calls_of, identity, picture

CFG = 5.0
STEPS = 901.0, 701.0, 501.0, 301.0, 101.0
CLOSE = 1e-4


@pytest.fixture
def vae(demo: Any) -> Any:
    return demo.vae


def sample(model: Any, batch: int = 1, **settings: Any) -> torch.Tensor:
    steps = sigmas(model, *STEPS)
    x = latents(batch) * torch.sqrt(steps[0] ** 2 + 1)
    return euler(guider(model, CFG), x, steps, **settings)


def rows_of_a_run(model: Any) -> list[int]:
    """Rows of each call of the UNet: 2 of the sample, others of references."""
    with calls_of(model) as calls:
        sample(model)
    return calls.rows


def test_references_act(pack: Pack, unet: Any, vae: Any) -> None:
    plain = predict(unet, CFG)
    first, second = (predict(identity(pack, unet, vae, images=picture(n)), CFG) for n in (1, 2))
    assert difference(first, plain) > 0.01
    assert difference(first, second) > 0.01


def test_weight_zero_is_the_plain_model_to_the_bit_and_reads_nothing(
    pack: Pack, unet: Any, vae: Any
) -> None:
    plain = sample(unet)
    zero = identity(pack, unet, vae, weight=0.0)
    with calls_of(unet) as calls:
        assert torch.equal(sample(zero), plain)
    assert calls.rows == [2] * len(STEPS)


def test_each_step_reads_the_references_once(pack: Pack, unet: Any, vae: Any) -> None:
    assert rows_of_a_run(identity(pack, unet, vae)) == [1, 2] * len(STEPS)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.3, 0.7), (0.5, 1.0)])
def test_the_window_is_a_switch_and_outside_it_nothing_is_read(
    pack: Pack, unet: Any, vae: Any, start: float, end: float
) -> None:
    sampling = unet.model.model_sampling
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    window = identity(pack, unet, vae, start_percent=start, end_percent=end)
    always = identity(pack, unet, vae)
    steps = sigmas(unet, *STEPS)
    inside = [bool(last <= sigma <= first) for sigma in steps[:-1]]
    assert any(inside)
    assert not all(inside)
    with calls_of(unet) as calls:
        result = sample(window)
    assert calls.rows == [row for acts in inside for row in ([1, 2] if acts else [2])]
    x = latents() * torch.sqrt(steps[0] ** 2 + 1)
    for number, acts in enumerate(inside):
        x = euler(guider(always if acts else unet, CFG), x, steps[number : number + 2])
    assert difference(result, x) < 1e-3


def test_a_curve_multiplies_the_weight(pack: Pack, unet: Any, vae: Any) -> None:
    constant = pack.run("EasyRefWeightCurve", "custom points", 1.0, 1.0, "0:0.4")
    halved = predict(identity(pack, unet, vae, curve=constant, weight=0.5), CFG)
    assert torch.equal(halved, predict(identity(pack, unet, vae, weight=0.2), CFG))
    late = pack.run("EasyRefWeightCurve", "custom points", 1.0, 1.0, "0.5:0, 1:1")
    rows = rows_of_a_run(identity(pack, unet, vae, curve=late))
    assert rows == [2, 2] + [1, 2] * 3 or rows == [2, 2, 2] + [1, 2] * 2


@pytest.mark.parametrize("fade", [0.0, 0.2])
def test_a_stage_is_a_window(pack: Pack, unet: Any, vae: Any, fade: float) -> None:
    stages = pack.nodes["EasyRefStages"].execute("custom", 0.0, 0.3, 1.0, 0.4, 0.8, 0.5, fade)
    model = identity(pack, unet, vae, curve=stages[1])
    rows = rows_of_a_run(model)
    if fade == 0:
        window = identity(pack, unet, vae, start_percent=0.4, end_percent=0.8, weight=0.5)
        assert torch.equal(sample(model), sample(window))
        assert rows == rows_of_a_run(window)
    assert rows.count(2) == len(STEPS)
    assert 0 < rows.count(1) < len(STEPS)


def test_only_conditional_rows_change(pack: Pack, unet: Any, vae: Any) -> None:
    def outputs(model: Any) -> torch.Tensor:
        found: list[torch.Tensor] = []
        unet.model.diffusion_model.register_forward_hook(lambda m, a, out: found.append(out))
        predict(model, CFG)
        return found[-1]  # [negative, positive]

    plain, changed = outputs(unet), outputs(identity(pack, unet, vae))
    assert torch.equal(plain[0], changed[0])
    assert difference(plain[1], changed[1]) > 0.01


def test_references_of_one_size_share_a_pass(pack: Pack, unet: Any, vae: Any) -> None:
    group = gathered(pack, picture(1), picture(2, 64, 256), picture(3, 300, 300))
    model = identity(pack, unet, vae, references=group)
    with calls_of(unet) as calls:
        predict(model, CFG)
    assert sorted(calls.rows) == [1, 2, 2]
    assert {tuple(x.shape[-2:]) for x in calls.inputs} == {(16, 16), (32, 8)}


def test_where_memory_is_short_references_are_read_in_several_passes(
    pack: Pack, unet: Any, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = identity(pack, unet, vae, images=torch.cat([picture(n) for n in range(5)]))
    together = predict(model, CFG)
    reading = pack.part("nodes.sampling.identity_pass")
    per_row = unet.model.memory_required([1, 4, 16, 16])
    memory = SimpleNamespace(get_free_memory=lambda device: 3.5 * per_row)
    monkeypatch.setattr(reading, "mm", memory)
    with calls_of(unet) as calls:
        apart = predict(model, CFG)
    assert max(calls.rows[:-1]) <= 2
    assert sum(calls.rows) == 5 + calls.rows[-1]
    assert difference(together, apart) < CLOSE


def test_a_reference_of_weight_zero_is_left_out(pack: Pack, unet: Any, vae: Any) -> None:
    alone = predict(identity(pack, unet, vae, references=gathered(pack, picture(1))), CFG)
    silent = gathered(pack, picture(2), weight=0.0)
    both = silent + gathered(pack, picture(1))
    assert torch.equal(predict(identity(pack, unet, vae, references=both), CFG), alone)
    with pack.refused("no reference pictures", "weight 0"):
        identity(pack, unet, vae, references=silent)


def test_every_latent_of_a_batch_gets_what_it_gets_alone(pack: Pack, unet: Any, vae: Any) -> None:
    model, x = identity(pack, unet, vae), latents(3)
    together = predict(model, CFG, x)
    for number in range(3):
        alone = predict(model, CFG, x[number : number + 1])
        assert difference(together[number : number + 1], alone) < CLOSE


def test_pictures_are_encoded_once_for_each_size_of_sample(
    pack: Pack, unet: Any, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, shapes = vae.encode, []
    monkeypatch.setattr(vae, "encode", lambda x: shapes.append(tuple(x.shape)) or encode(x))
    model = identity(pack, unet, vae, images=torch.cat([picture(1), picture(2)]))
    assert shapes == []
    for size in ((16, 16), (16, 16), (24, 24), (8, 32)):
        predict(model, CFG, latents(1, *size))
    assert shapes == [(2, 128, 128, 3), (2, 192, 192, 3)]


def test_the_model_given_stays_as_it_was_and_copies_share_the_references(
    pack: Pack, unet: Any, vae: Any
) -> None:
    from comfy.patcher_extension import WrappersMP

    plain = predict(unet, CFG)
    model = identity(pack, unet, vae)
    assert model.model_options == {"transformer_options": {}}
    acting = predict(model, CFG)
    assert model.model_options == {"transformer_options": {}}
    assert torch.equal(predict(unet, CFG), plain)
    assert torch.equal(predict(model.clone().clone(), CFG), acting)
    (patch,) = model.get_wrappers(WrappersMP.APPLY_MODEL, "easyref_identity")
    assert copy.deepcopy({"wrappers": [patch]})["wrappers"] == [patch]


def test_several_nodes_add_up_in_either_order(pack: Pack, unet: Any, vae: Any) -> None:
    settings = {"images": picture(1), "weight": 0.5}, {"images": picture(2), "weight": 0.7}
    results = []
    for first, second in (settings, settings[::-1]):
        results.append(predict(identity(pack, identity(pack, unet, vae, **first), vae, **second)))
    assert difference(*results) < CLOSE
    for alone in settings:
        assert difference(results[0], predict(identity(pack, unet, vae, **alone))) > 0.01


def test_layer_weights_choose_layers(pack: Pack, demo: Any) -> None:
    layers = pack.part("easyref_core.adapter.layer_weights")
    texts = {"positive": random_text(1, pooled=64), "negative": random_text(2, pooled=64)}
    x = latents()

    def result(**factors: float) -> torch.Tensor:
        weights = layers.LayerWeights(factors)
        return predict(identity(pack, demo.model, demo.vae, layer_weights=weights), CFG, x, **texts)

    plain, everywhere = predict(demo.model, CFG, x, **texts), result()
    assert torch.equal(result(**dict.fromkeys(layers.GROUPS, 0.0)), plain)
    one = result(**dict.fromkeys(set(layers.GROUPS) - {"output_1"}, 0.0))
    assert difference(one, everywhere) > 0.001
    assert difference(one, plain) > 0.001


def test_layer_weights_for_layers_that_the_model_lacks_are_refused(
    pack: Pack, unet: Any, vae: Any
) -> None:
    weights = pack.part("easyref_core.adapter.layer_weights").LayerWeights({"input_8": 0.0})
    with pack.refused("input_8", "no such layers"):
        identity(pack, unet, vae, layer_weights=weights)


def test_a_start_after_the_end_is_refused(pack: Pack, unet: Any, vae: Any) -> None:
    with pack.refused("start_percent (0.8)", "end_percent (0.3)"):
        identity(pack, unet, vae, start_percent=0.8, end_percent=0.3)


def test_no_pictures_are_refused(pack: Pack, unet: Any, vae: Any) -> None:
    with pack.refused("no reference pictures", "Connect images"):
        identity(pack, unet, vae, images=None)


def test_a_picture_that_is_a_line_is_refused(pack: Pack, unet: Any, vae: Any) -> None:
    with pack.refused("600x2", "Crop it"):
        identity(pack, unet, vae, images=picture(1, 600, 2))


class Vae:
    """A VAE of another kind."""

    def __init__(self, channels: int = 4, value: float = 0.0) -> None:
        self._channels, self._value = channels, value

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        rows, height, width, _ = pixels.shape
        return torch.full((rows, self._channels, height // 8, width // 8), self._value)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_latents_of_another_kind_of_model_are_refused_before_sampling(
    pack: Pack, unet: Any
) -> None:
    model = identity(pack, unet, Vae(channels=16))
    with calls_of(unet) as calls, pack.refused("[1, 16, 16, 16]", "[1, 4, 16, 16]", "VAE"):
        predict(model)
    assert not calls.rows


def test_latents_that_are_no_numbers_are_refused(pack: Pack, unet: Any) -> None:
    with pack.refused("not numbers", "--fp32-vae"):
        predict(identity(pack, unet, Vae(value=float("nan"))))
