"""The adapter in diffusers' pipelines, beside LoRAs, IP-Adapters, offloading and guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import goldens
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from golden_pipeline import latents, load_ip_adapter
from golden_unet import TOLERANCE, golden, is_golden, modules, predict

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.sdxl_diffusers.adapter import (
    attach_adapter,
    detach_adapter,
    hide_references,
    merge_lora,
    set_scale,
)

LAYER = goldens.description()["unet"]["layer"]
PAG = ["down", "mid", "up"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("guidance_scale", [5.0, 0.0])
def test_perturbed_attention_guidance_keeps_the_lora(
    steered: UNet2DConditionModel, pipeline: Callable, guidance_scale: float
) -> None:
    """As a UNet whose weights hold the LoRA: there, processors cannot lose it."""
    merged = copy.deepcopy(steered)
    merge_lora(merged)
    options = {"pag_scale": 3.0, "guidance_scale": guidance_scale}
    kind = diffusers.StableDiffusionXLPAGPipeline
    found = latents(pipeline(kind, steered, pag_applied_layers=PAG), **options)
    wanted = latents(pipeline(kind, merged, pag_applied_layers=PAG), **options)
    assert goldens.difference(found, wanted) <= TOLERANCE
    usual = latents(pipeline(StableDiffusionXLPipeline, steered), guidance_scale=guidance_scale)
    assert goldens.difference(found, usual) > 0.1
    assert is_golden(steered)


def test_a_converted_pipeline_keeps_the_adapter(
    steered: UNet2DConditionModel, pipeline: Callable
) -> None:
    pipe = pipeline(StableDiffusionXLPipeline, steered)
    pag = diffusers.AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True)
    pag.set_progress_bar_config(disable=True)
    assert torch.equal(latents(pag, pag_scale=0.0), latents(pipe))
    assert diffusers.AutoPipelineForImage2Image.from_pipe(pipe).unet is steered


def test_an_ip_adapter_comes_and_goes_beside_the_adapter(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint, pipeline: Callable
) -> None:
    embeds = [torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))]
    later = pipeline(StableDiffusionXLPipeline, copy.deepcopy(unet))
    attach_adapter(later.unet, checkpoint)
    alone = latents(later)
    load_ip_adapter(later, 0.0)
    assert torch.equal(latents(later, ip_adapter_image_embeds=embeds), alone)
    later.set_ip_adapter_scale(0.7)
    both = latents(later, ip_adapter_image_embeds=embeds)
    assert goldens.difference(both, alone) > 0.05

    earlier = pipeline(StableDiffusionXLPipeline, unet)
    load_ip_adapter(earlier, 0.7)
    only = earlier.unet.attn_processors
    attach_adapter(unet, checkpoint)
    assert torch.equal(latents(earlier, ip_adapter_image_embeds=embeds), both)
    detach_adapter(unet)
    assert unet.attn_processors == only

    later.unload_ip_adapter()
    assert torch.equal(latents(later), alone)


def low_rank(unet: UNet2DConditionModel, **options: Any) -> dict[str, torch.Tensor]:
    """A LoRA file's content, random, for every attention layer."""
    peft = pytest.importorskip("peft")
    parts = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=4, target_modules=parts, init_lora_weights=False, **options)
    torch.manual_seed(0)
    other = copy.deepcopy(unet)
    other.add_adapter(config, adapter_name="other")
    weights = peft.utils.get_peft_model_state_dict(other, adapter_name="other")
    return {f"unet.{name}": weight for name, weight in weights.items()}


def test_another_lora_comes_and_goes_beside_the_adapter(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint, pipeline: Callable
) -> None:
    weights, tokens = low_rank(unet), golden("ref_tokens")
    later = pipeline(StableDiffusionXLPipeline, copy.deepcopy(unet))
    attach_adapter(later.unet, checkpoint)
    later.load_lora_weights(dict(weights))
    both = predict(later.unet, tokens)
    assert goldens.difference(both, golden("noise_pred.scale_1.0")) > 0.1

    earlier = pipeline(StableDiffusionXLPipeline, unet)
    earlier.load_lora_weights(dict(weights))
    attach_adapter(unet, checkpoint)
    assert torch.equal(predict(unet, tokens), both)
    earlier.unload_lora_weights()
    assert is_golden(unet)

    later.fuse_lora()
    assert goldens.difference(predict(later.unet, tokens), both) <= TOLERANCE
    later.unfuse_lora()
    merge_lora(later.unet)
    assert goldens.difference(predict(later.unet, tokens), both) <= TOLERANCE
    later.unload_lora_weights()
    assert is_golden(later.unet)


def test_merging_beneath_a_dora_is_refused(
    steered: UNet2DConditionModel, plain: UNet2DConditionModel, pipeline: Callable
) -> None:
    pipe = pipeline(StableDiffusionXLPipeline, steered)
    pipe.load_lora_weights(low_rank(plain, use_dora=True))
    before = predict(steered, golden("ref_tokens"))
    with goldens.refused("merge_lora", "DoRA", "unload_lora_weights()"):
        merge_lora(steered)
    assert torch.equal(predict(steered, golden("ref_tokens")), before)
    pipe.unload_lora_weights()
    merge_lora(steered)
    assert is_golden(steered)


def test_controlnets_side_by_side_get_the_text_alone(
    plain: UNet2DConditionModel, steered: UNet2DConditionModel, pipeline: Callable
) -> None:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(plain, conditioning_channels=3).eval()
    goldens.randomise(controlnet.controlnet_mid_block)
    two = [controlnet, copy.deepcopy(controlnet)]
    pipe = pipeline(diffusers.StableDiffusionXLControlNetPipeline, steered, controlnet=two)
    pictures = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))] * 2
    seen = latents(pipe, image=pictures)
    hide_references(pipe.controlnet, steered)
    hidden = latents(pipe, image=pictures)
    assert goldens.difference(seen, hidden) > 1e-3
    pipe.controlnet.nets[0].set_attention_slice("max")
    hide_references(pipe.controlnet, steered)  # again: the same
    assert goldens.difference(latents(pipe, image=pictures), hidden) <= TOLERANCE


def test_casting_by_layer_reaches_the_adapter(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    if not hasattr(unet, "enable_layerwise_casting"):
        pytest.skip("this diffusers has no casting by layer")
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    attach_adapter(unet, checkpoint)
    tokens, wanted = golden("ref_tokens"), golden("noise_pred.scale_1.0")
    assert {w.dtype for n, w in unet.named_parameters() if ".easyref." in n} == {torch.float32}
    assert goldens.difference(predict(unet, tokens), wanted) <= 0.01


def test_group_offloading_comes_last(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    if not hasattr(unet, "enable_group_offload"):
        pytest.skip("this diffusers has no group offloading")
    options = {"onload_device": CPU, "offload_device": CPU, "offload_type": "leaf_level"}
    other = copy.deepcopy(unet)
    other.enable_group_offload(**options)
    before = modules(other)
    with goldens.refused("attach_adapter", "group offloading", "last"):
        attach_adapter(other, checkpoint)
    assert modules(other) == before
    attach_adapter(unet, checkpoint)
    unet.enable_group_offload(**options)
    assert is_golden(unet)
    with goldens.refused("merge_lora", "group offloading"):
        merge_lora(unet)


def test_hooks_on_attention_layers_act_around_the_adapter(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint, plain: UNet2DConditionModel
) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    skip = pytest.importorskip("diffusers.hooks.layer_skip")
    options = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}

    def perturb(model: UNet2DConditionModel) -> None:
        blocks = LAYER.rpartition(".")[0]
        config = skip.LayerSkipConfig(indices=[0, 1], fqn=blocks, **options)
        skip._apply_layer_skip_hook(model, config, name="perturb")

    def restore(model: UNet2DConditionModel) -> None:
        hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook("perturb", True)

    perturb(unet)
    before = modules(unet)
    with goldens.refused("attach_adapter", "hook", LAYER.rpartition(".")[0]):
        attach_adapter(unet, checkpoint)
    assert modules(unet) == before
    restore(unet)
    attach_adapter(unet, checkpoint)
    assert is_golden(unet)

    merged = copy.deepcopy(unet)
    merge_lora(merged)
    perturb(unet)
    perturb(merged)
    tokens = golden("ref_tokens")
    found = predict(unet, tokens)
    assert goldens.difference(found, predict(merged, tokens)) <= TOLERANCE
    assert goldens.difference(found, golden("noise_pred.scale_1.0")) > 0.1
    detach_adapter(unet)  # beneath the hook
    restore(unet)
    assert torch.equal(predict(unet, None), predict(plain, None))


def test_an_attention_backend_changes_nothing(steered: UNet2DConditionModel) -> None:
    if not hasattr(steered, "set_attention_backend"):
        pytest.skip("this diffusers has no attention backends")
    steered.set_attention_backend("native")
    assert is_golden(steered)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_scales_that_are_no_numbers_are_refused(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint, scale: Any
) -> None:
    before = modules(unet)
    with goldens.refused("scale is", "number"):
        attach_adapter(unet, checkpoint, scale=scale)
    assert modules(unet) == before
    attach_adapter(unet, checkpoint)
    with goldens.refused("scale is", "number"):
        set_scale(unet, scale)
    assert is_golden(unet)
