"""The adapter acts whatever attention processors its layers have, or says why it cannot."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import goldens
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from golden_unet import TOLERANCE, golden, is_golden, modules, predict

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.sdxl_diffusers.adapter import (
    attach_adapter,
    detach_adapter,
    merge_lora,
    set_scale,
)

LAYER = goldens.description()["unet"]["layer"]


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)])
def test_other_processors_change_nothing(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint, processor: Any
) -> None:
    attach_adapter(unet, checkpoint)
    unet.set_attn_processor(processor)
    assert is_golden(unet)
    assert set(unet.attn_processors.values()) == {processor}


def test_switches_of_the_unet_change_nothing(steered: UNet2DConditionModel) -> None:
    steered.set_attention_slice("auto")
    assert is_golden(steered)
    steered.set_default_attn_processor()
    assert is_golden(steered)


def test_xformers_processors_change_nothing(
    steered: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

    stand_in = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))
    monkeypatch.setattr(attention_processor, "xformers", stand_in, raising=False)
    steered.set_attn_processor(XFormersAttnProcessor())
    assert is_golden(steered)


@torch.no_grad()
def test_fused_projections_keep_the_lora(steered: UNet2DConditionModel) -> None:
    steered.fuse_qkv_projections()
    assert is_golden(steered)
    before = {n: t.clone() for n, t in steered.state_dict().items()}
    with goldens.refused("merge_lora", "fused", "unfuse_qkv_projections"):
        merge_lora(steered)
    assert all(torch.equal(t, before[n]) for n, t in steered.state_dict().items())
    steered.unfuse_qkv_projections()
    merge_lora(steered)
    steered.fuse_qkv_projections()
    assert is_golden(steered)


@torch.no_grad()
def test_an_adapter_is_attached_to_fused_projections(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    unet.fuse_qkv_projections()
    attach_adapter(unet, checkpoint)
    assert is_golden(unet)


@torch.no_grad()
def test_references_add_to_those_of_an_ip_adapter(steered: UNet2DConditionModel) -> None:
    """What enters the last projection, which is linear, is text + references + IP-Adapter."""
    values = goldens.expected()
    attn = steered.get_submodule(f"{LAYER}.attn2")
    context = torch.cat((values["attn.attn2.text_states"], values["attn.attn2.ref_tokens"]), dim=1)
    images = torch.randn(1, 1, 4, 96, generator=torch.Generator().manual_seed(0))
    ip_adapter = IPAdapterAttnProcessor2_0(attn.to_q.in_features, 96, num_tokens=(4,))
    goldens.randomise(ip_adapter)
    attn.set_processor(ip_adapter)

    def out(scale: float, ip_scale: float) -> torch.Tensor:
        set_scale(steered, scale)
        ip_adapter.scale = [ip_scale]
        return attn(values["attn.scale_1.0.attn2.hidden_in"], (context, [images]))

    assert goldens.difference(out(1.0, 0.0), values["attn.scale_1.0.attn2.out"]) <= TOLERANCE
    text = out(0.0, 0.0)
    wanted = (out(1.0, 0.0) - text) + (out(0.0, 0.7) - text)
    assert (out(0.0, 0.7) - text).abs().max() > 0.01
    assert goldens.difference(out(1.0, 0.7) - text, wanted) <= TOLERANCE


class OwnProjection:
    """A processor that leaves out the layer's own keys and values, as custom diffusion does."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return attn.to_out[0](attn.to_q(hidden_states))


class TwoResults:
    """A processor that projects two results."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        query = attn.to_q(hidden_states)
        return attn.to_out[0](query) - attn.to_out[0](query)


class OtherRows:
    """A processor whose result is not one of its query."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        query = attn.to_q(hidden_states[:, 1:])
        return attn.to_out[0](torch.cat((query, query[:, :1]), dim=1))


@pytest.mark.parametrize(
    ("layer", "processor", "said"),
    [
        ("attn1", OwnProjection(), "does not use to_k, to_v of the layer"),
        ("attn2", OwnProjection(), "does not use to_k, to_v of the layer"),
        ("attn2", TwoResults(), "does not compute one result from one query"),
        ("attn2", OtherRows(), "does not compute one result from one query"),
    ],
)
def test_processors_past_the_adapter_are_refused(
    steered: UNet2DConditionModel, layer: str, processor: Any, said: str
) -> None:
    steered.get_submodule(f"{LAYER}.{layer}").set_processor(processor)
    with goldens.refused(type(processor).__name__, f"{LAYER}.{layer}", said):
        predict(steered, golden("ref_tokens"))
    detach_adapter(steered)
    assert predict(steered, None).isfinite().all()


def test_layers_of_another_class_are_refused_before_anything_changes(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    class Special(Attention):
        pass

    unet.get_submodule(f"{LAYER}.attn1").__class__ = Special
    before = modules(unet)
    with goldens.refused(f"{LAYER}.attn1", "Special"):
        attach_adapter(unet, checkpoint)
    assert modules(unet) == before


def test_a_copy_has_an_adapter_of_its_own(
    steered: UNet2DConditionModel, plain: UNet2DConditionModel
) -> None:
    other = copy.deepcopy(steered)
    set_scale(other, 0.6)
    found = predict(other, golden("ref_tokens"))
    assert goldens.difference(found, golden("noise_pred.scale_0.6")) <= TOLERANCE
    detach_adapter(other)
    assert torch.equal(predict(other, None), predict(plain, None))
    assert is_golden(steered)


def test_a_compiled_layer_follows_the_adapter(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    attn = unet.get_submodule(f"{LAYER}.attn2")
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    values = goldens.expected()
    hidden = values["attn.scale_1.0.attn2.hidden_in"]
    text, tokens = values["attn.attn2.text_states"], values["attn.attn2.ref_tokens"]
    both = torch.cat((text, tokens), dim=1)
    with torch.no_grad():
        before = compiled(hidden, text)
        attach_adapter(unet, checkpoint)
        for scale in (1.0, 0.6):
            set_scale(unet, scale)
            wanted = values[f"attn.scale_{scale}.attn2.out"]
            entered = values[f"attn.scale_{scale}.attn2.hidden_in"]
            assert goldens.difference(compiled(entered, both), wanted) <= TOLERANCE
        detach_adapter(unet)
        assert torch.equal(compiled(hidden, text), before)
