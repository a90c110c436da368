"""The adapter on a diffusers UNet predicts what the official one predicts."""

from __future__ import annotations

from collections.abc import Callable

import goldens
import pytest
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from golden_unet import TOLERANCE, golden, made, modules, predict

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.sdxl_diffusers.adapter import (
    append_tokens,
    attach_adapter,
    cross_attention_layers,
    hide_references,
    merge_lora,
    new_adapter,
    set_scale,
    set_tokens,
)
from easyref_core.sdxl_diffusers.unet_layers import official_name

LAYER = goldens.description()["unet"]["layer"]


def cfg_batch(unet: UNet2DConditionModel) -> torch.Tensor:
    """Row 0 negative, row 1 conditional, as the official pipeline orders them."""
    return predict(
        unet,
        torch.cat((golden("uncond_ref_tokens"), golden("ref_tokens"))),
        torch.cat((golden("negative_text_states"), golden("text_states"))),
        torch.cat((golden("negative_pooled_text"), golden("pooled_text"))),
    )


def test_without_an_adapter(plain: UNet2DConditionModel) -> None:
    assert goldens.difference(predict(plain, None), golden("noise_pred.no_adapter")) <= TOLERANCE


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.6, 0.0])
def test_golden_prediction(steered: UNet2DConditionModel, scale: float, merged: bool) -> None:
    set_scale(steered, scale)
    if merged:
        merge_lora(steered)
        assert not any("_lora" in name for name in steered.state_dict())
    found = predict(steered, golden("ref_tokens"))
    assert goldens.difference(found, golden(f"noise_pred.scale_{scale}")) <= TOLERANCE


def test_golden_prediction_of_the_other_tokens(steered: UNet2DConditionModel) -> None:
    tokens = goldens.expected()["adapter_only.four_refs_prompt.tokens"]
    wanted = golden("noise_pred.scale_1.0.adapter_only_tokens")
    assert goldens.difference(predict(steered, tokens), wanted) <= TOLERANCE


def test_golden_guided_batch(steered: UNet2DConditionModel) -> None:
    found = cfg_batch(steered)
    assert goldens.difference(found, golden("noise_pred.cfg_batch")) <= TOLERANCE
    guided = found[:1] + 7.5 * (found[1:] - found[:1])
    assert goldens.difference(guided, golden("noise_pred.cfg_guided_7.5")) <= 5e-4


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_golden_attention_layers(steered: UNet2DConditionModel, scale: float, merged: bool) -> None:
    values = goldens.expected()
    set_scale(steered, scale)
    if merged:
        merge_lora(steered)
    block = steered.get_submodule(LAYER)
    context = torch.cat((values["attn.attn2.text_states"], values["attn.attn2.ref_tokens"]), dim=1)
    with torch.no_grad():
        crossed = block.attn2(values[f"attn.scale_{scale}.attn2.hidden_in"], context)
        own = block.attn1(values["attn.attn1.hidden_in"])
    assert goldens.difference(crossed, values[f"attn.scale_{scale}.attn2.out"]) <= TOLERANCE
    assert goldens.difference(own, values["attn.attn1.out"]) <= TOLERANCE


@torch.no_grad()
def test_golden_generation(steered: UNet2DConditionModel) -> None:
    details, values = goldens.description()["generate"], goldens.expected()
    count = details["num_samples"]
    set_scale(steered, details["scale"])
    scheduler = EulerDiscreteScheduler(**details["scheduler_config"])
    scheduler.set_timesteps(details["steps"])
    assert scheduler.timesteps.tolist() == details["timesteps"]

    def both(negative: str, positive: str) -> torch.Tensor:
        rows = (golden(negative), golden(positive))
        return torch.cat([r.repeat_interleave(count, dim=0) for r in rows])

    text = both("negative_text_states", "text_states")
    context = torch.cat((text, both("uncond_ref_tokens", "ref_tokens")), dim=1)
    conditions = {
        "text_embeds": both("negative_pooled_text", "pooled_text"),
        "time_ids": torch.tensor([details["time_ids"]] * 2 * count),
    }
    latents = values["generate.latents_in"] * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        entered = scheduler.scale_model_input(torch.cat((latents, latents)), timestep)
        noise = steered(entered, timestep, context, added_cond_kwargs=conditions).sample
        if step == 0:
            assert goldens.difference(entered, values["generate.first_unet_input"]) <= TOLERANCE
            assert goldens.difference(noise, values["generate.first_noise_pred"]) <= TOLERANCE
        negative, positive = noise.chunk(2)
        guided = negative + details["guidance_scale"] * (positive - negative)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    assert goldens.difference(latents, values["generate.latents_out"]) <= 5e-4


def test_state_dict_has_the_official_names_and_weights(
    steered: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    official = {
        n.removeprefix("unet."): t
        for n, t in goldens.adapter_tensors().items()
        if n.startswith("unet.")
    }
    found = {official_name(n): t for n, t in steered.state_dict().items() if ".easyref." in n}
    assert found.keys() == official.keys()
    assert all(torch.equal(t, found[n]) for n, t in official.items())
    assert len(found) == 144


def test_new_adapter_starts_from_the_base(
    unet: UNet2DConditionModel, plain: UNet2DConditionModel
) -> None:
    new_adapter(unet, num_tokens=16, rank=4)
    names = set(unet.state_dict()) - set(plain.state_dict())
    assert {official_name(f"unet.{n}") for n in names} == {
        n for n in goldens.adapter_tensors() if n.startswith("unet.")
    }
    for layer in cross_attention_layers(unet):
        attn = unet.get_submodule(layer)
        assert torch.equal(attn.easyref.to_k_ip.weight, attn.to_k.weight)
        assert torch.equal(attn.easyref.to_v_ip.weight, attn.to_v.weight)
        assert attn.easyref.to_k_ip.weight.data_ptr() != attn.to_k.weight.data_ptr()
    set_scale(unet, 0.0)
    found = predict(unet, golden("ref_tokens"))
    assert goldens.difference(found, golden("noise_pred.no_adapter")) <= TOLERANCE


def test_scale_zero_without_lora_is_the_plain_model_and_a_large_scale_is_not(
    unet: UNet2DConditionModel, save: Callable
) -> None:
    bare = save(goldens.without(goldens.adapter_tensors(), "_lora"))
    attach_adapter(unet, bare, scale=0.0)
    assert not any("_lora" in name for name in unet.state_dict())
    wanted, tokens = golden("noise_pred.no_adapter"), golden("ref_tokens")
    assert goldens.difference(predict(unet, tokens), wanted) <= TOLERANCE
    errors = []
    for scale in (0.1, 1.0, 10.0):
        set_scale(unet, scale)
        errors.append(goldens.difference(predict(unet, tokens), wanted))
    assert errors == sorted(errors)
    assert errors[0] > 1e-3
    assert errors[-1] > 0.5


def test_attach_takes_the_scale(unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint) -> None:
    attach_adapter(unet, checkpoint, scale=0.6)
    found = predict(unet, golden("ref_tokens"))
    assert goldens.difference(found, golden("noise_pred.scale_0.6")) <= TOLERANCE


def test_another_unet_is_refused_and_left_alone(checkpoint: AdapterCheckpoint) -> None:
    config = dict(UNet2DConditionModel.load_config(goldens.UNET))
    for changes, said in (
        ({"cross_attention_dim": 768}, ("768", "Stable Diffusion 1.5", "96")),
        ({"cross_attention_dim": 1280}, ("1280", "refiner", "96")),
        ({"transformer_layers_per_block": [1, 1]}, ("4 cross-attention layers", "8", "first at")),
        ({"block_out_channels": [32, 128]}, ("128 wide at", "64")),
    ):
        other = UNet2DConditionModel.from_config({**config, **changes})
        before = modules(other)
        with goldens.refused("easyref.safetensors", "UNet2DConditionModel", *said):
            attach_adapter(other, checkpoint)
        assert modules(other) == before


@pytest.mark.parametrize(
    ("part", "found"),
    [("attn1.processor.to_q_lora.down", [4, 7]), ("attn2.processor.to_out_lora.up", [7, 4])],
)
def test_lora_of_another_shape_is_refused(
    unet: UNet2DConditionModel, save: Callable, part: str, found: list[int]
) -> None:
    tensors, name = goldens.adapter_tensors(), f"unet.{LAYER}.{part}.weight"
    wanted = list(tensors[name].shape)
    before = modules(unet)
    with goldens.refused("changed.safetensors", name, found, wanted):
        attach_adapter(unet, save(tensors | {name: torch.zeros(found)}))
    assert modules(unet) == before


def test_lora_for_a_layer_that_is_not_there_is_refused(
    unet: UNet2DConditionModel, save: Callable
) -> None:
    tensors, absent = goldens.adapter_tensors(), LAYER.replace("down_blocks.1", "down_blocks.0")
    more = {
        name.replace(LAYER, absent): tensor.clone()
        for name, tensor in tensors.items()
        if f"{LAYER}.attn1" in name
    }
    before = modules(unet)
    with goldens.refused("changed.safetensors", f"{absent}.attn1"):
        attach_adapter(unet, save(tensors | more))
    assert modules(unet) == before


def test_a_unet_is_not_taken_for_a_controlnet(steered: UNet2DConditionModel) -> None:
    with goldens.refused("hide_references", "a UNet with an adapter"):
        hide_references(steered, steered)
    found = predict(steered, golden("ref_tokens"))
    assert goldens.difference(found, golden("noise_pred.scale_1.0")) <= TOLERANCE


def test_unfit_calls_of_the_unet_are_refused(steered: UNet2DConditionModel) -> None:
    with goldens.refused("10 rows", "16 reference tokens", "set_tokens(unet, None)"):
        predict(steered, None, text=golden("text_states")[:, :10])
    attn = steered.get_submodule(f"{LAYER}.attn1")
    with goldens.refused("attention mask"):
        attn(torch.zeros(1, 4, 8), attention_mask=torch.ones(1, 4))


def test_adapter_takes_the_dtype_of_its_unet(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    attach_adapter(unet.to(torch.bfloat16), checkpoint)
    assert {t.dtype for t in unet.state_dict().values()} == {torch.bfloat16}


def control(controlnet: ControlNetModel, context: torch.Tensor) -> torch.Tensor:
    conditions = {"text_embeds": golden("pooled_text"), "time_ids": golden("time_ids")}
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return controlnet(
            golden("latents"), golden("timestep"), context, picture, added_cond_kwargs=conditions
        ).mid_block_res_sample


def test_a_controlnet_gets_the_text_alone(
    plain: UNet2DConditionModel, steered: UNet2DConditionModel
) -> None:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(plain, conditioning_channels=3).eval()
    goldens.randomise(controlnet.controlnet_mid_block)
    text, tokens = golden("text_states"), golden("ref_tokens")
    wanted, both = control(controlnet, text), torch.cat((text, tokens), dim=1)
    assert goldens.difference(control(controlnet, both), wanted) > 1e-2
    hide_references(controlnet, steered)
    assert goldens.difference(control(controlnet, both), wanted) <= TOLERANCE
    twice, _ = append_tokens(steered, made(2), text)
    assert goldens.difference(control(controlnet, twice), wanted) <= TOLERANCE
    set_tokens(steered, None)
    assert goldens.difference(control(controlnet, text), wanted) <= TOLERANCE
