"""Using the adapter in diffusers: which rows are references, taking it off, other packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import goldens
import pytest
import torch
from diffusers import UNet2DConditionModel
from golden_unet import TOLERANCE, golden, is_golden, made, modules, predict
from torch import nn

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.sdxl_diffusers.adapter import (
    append_tokens,
    attach_adapter,
    detach_adapter,
    hide_references,
    merge_lora,
    new_adapter,
    set_scale,
    set_tokens,
)
from easyref_core.sdxl_diffusers.adapter_layer import LowRank
from easyref_core.sdxl_diffusers.unet_layers import official_name

LAYER = goldens.description()["unet"]["layer"]


def test_the_unet_attends_to_the_appended_tokens(steered: UNet2DConditionModel) -> None:
    text, negative = golden("text_states"), golden("negative_text_states")
    both = append_tokens(steered, made(), text, negative)
    assert torch.equal(both[0], torch.cat((text, golden("ref_tokens")), dim=1))
    assert torch.equal(both[1], torch.cat((negative, golden("uncond_ref_tokens")), dim=1))
    found = predict(steered, None, text=both[0])
    assert goldens.difference(found, golden("noise_pred.scale_1.0")) <= TOLERANCE
    assert append_tokens(steered, made(), text)[1] is None


@pytest.mark.parametrize("times", [2, 5])
def test_tokens_of_several_groups_side_by_side_are_all_references(
    steered: UNet2DConditionModel, times: int
) -> None:
    """Every token repeated as often leaves the attention to them unchanged."""
    states, _ = append_tokens(steered, made(times), golden("text_states"))
    found = predict(steered, None, text=states)
    assert goldens.difference(found, golden("noise_pred.scale_1.0")) <= TOLERANCE
    set_tokens(steered, made())
    assert is_golden(steered)


def test_one_group_serves_all_prompts_and_several_one_each(steered: UNet2DConditionModel) -> None:
    text = golden("text_states").repeat(3, 1, 1)
    both, _ = append_tokens(steered, made(), text.bfloat16())
    assert both.dtype == torch.bfloat16
    assert both.shape == (3, text.shape[1] + 16, text.shape[2])
    three = made(cond=torch.rand(3, 16, 96), uncond=torch.rand(3, 16, 96))
    both, _ = append_tokens(steered, three, text)
    assert torch.equal(both[:, -16:], three.cond)
    with goldens.refused("1 texts of width 96", "3 groups of width 96"):
        append_tokens(steered, three, text[:1])
    with goldens.refused("3 texts of width 48", "1 groups of width 96"):
        append_tokens(steered, made(), text[..., :48])


@pytest.mark.parametrize("negative", [None, golden("text_states")[:, :5], "bad anatomy"])
def test_texts_that_are_no_states_of_one_shape_are_refused(
    steered: UNet2DConditionModel, negative: Any
) -> None:
    text = golden("text_states") if negative is not None else golden("text_states")[0]
    with goldens.refused("one shape [B, T, W]", list(text.shape)):
        append_tokens(steered, made(), text, negative)
    assert is_golden(steered)


def test_values_that_are_no_tokens_are_refused(steered: UNet2DConditionModel) -> None:
    tokens: Any = golden("ref_tokens")
    for call in (
        lambda: append_tokens(steered, tokens, golden("text_states")),
        lambda: set_tokens(steered, tokens),
    ):
        with goldens.refused("The tokens are a Tensor", "encode_references and load_tokens"):
            call()
    assert is_golden(steered)


@pytest.mark.parametrize("rank", [-1, 1e9, 2.5, float("nan"), "4"])
def test_ranks_that_are_no_counts_are_refused(
    unet: UNet2DConditionModel, save: Callable, rank: Any
) -> None:
    bare = save(goldens.without(goldens.adapter_tensors(), "_lora"))
    before = modules(unet)
    with goldens.refused("new_lora_rank is", "0 to 4096"):
        attach_adapter(unet, bare, new_lora_rank=rank)
    with goldens.refused("rank is", "0 to 4096"):
        new_adapter(unet, 16, rank=rank)
    assert modules(unet) == before


def test_without_references_all_rows_are_text(steered: UNet2DConditionModel) -> None:
    set_tokens(steered, None)
    assert is_golden(steered, tokens=None)  # only the LoRA is left
    set_tokens(steered, made())
    assert is_golden(steered)


def test_a_prompt_that_lost_its_tokens_is_refused(steered: UNet2DConditionModel) -> None:
    text = golden("text_states")
    append_tokens(steered, made(), text)
    rows = text.shape[1]
    with goldens.refused(
        f"have {rows} rows", f"{rows} text states", "16", "set_tokens(unet, None)"
    ):
        predict(steered, None)


def test_tokens_of_another_adapter_are_refused_and_nothing_changes(
    steered: UNet2DConditionModel,
) -> None:
    other = made(2, adapter="0123456789abcdef", adapter_name="other.safetensors")
    with goldens.refused("other.safetensors", "easyref.safetensors"):
        append_tokens(steered, other, golden("text_states"))
    assert is_golden(steered)


def test_without_an_adapter_each_call_says_so(unet: UNet2DConditionModel) -> None:
    text = golden("text_states")
    for call in (
        lambda: set_scale(unet, 1.0),
        lambda: set_tokens(unet, None),
        lambda: append_tokens(unet, made(), text),
        lambda: merge_lora(unet),
        lambda: detach_adapter(unet),
        lambda: hide_references(unet, unet),
    ):
        with goldens.refused("no EasyRef adapter", "attach_adapter first"):
            call()


def test_detaching_gives_the_plain_model_back(
    unet: UNet2DConditionModel, plain: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    before = modules(unet)
    attach_adapter(unet, checkpoint)
    attach_adapter(unet, checkpoint, scale=0.5)  # in the place of the first
    detach_adapter(unet)
    assert modules(unet) == before
    assert unet.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(predict(unet, None), predict(plain, None))
    attach_adapter(unet, checkpoint)
    assert is_golden(unet)


def test_a_merged_lora_cannot_be_taken_off(
    steered: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    merge_lora(steered)
    for call in (
        lambda: detach_adapter(steered),
        lambda: attach_adapter(steered, checkpoint),
        lambda: new_adapter(steered, 16),
    ):
        with goldens.refused("merged into this UNet's weights", "Load the UNet again"):
            call()
    assert is_golden(steered)


def test_attaching_draws_no_random_numbers(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    before = torch.get_rng_state()
    attach_adapter(unet, checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.requires_grad for n, weight in unet.named_parameters() if ".easyref." in n)


def test_a_new_lora_beside_trained_projections_is_drawn(
    unet: UNet2DConditionModel, save: Callable
) -> None:
    bare = save(goldens.without(goldens.adapter_tensors(), "_lora"))
    attach_adapter(unet, bare, new_lora_rank=4)
    loras = [module for module in unet.modules() if isinstance(module, LowRank)]
    assert len(loras) == 4 * len(unet.attn_processors)
    assert all(lora.down.weight.std() > 0 and not lora.up.weight.any() for lora in loras)


@pytest.mark.parametrize("part", ["attn2.processor.to_k_ip", "attn1.processor.to_q_lora.up"])
def test_damaged_weights_are_refused_before_anything_changes(
    unet: UNet2DConditionModel, save: Callable, part: str
) -> None:
    tensors, name = goldens.adapter_tensors(), f"unet.{LAYER}.{part}.weight"
    tensors[name][0, 0] = float("nan")
    before = modules(unet)
    with goldens.refused("changed.safetensors", name, "not numbers"):
        attach_adapter(unet, save(tensors))
    assert modules(unet) == before


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_adapter_in_one_byte_floats_is_widened(
    unet: UNet2DConditionModel, save: Callable, dtype: torch.dtype
) -> None:
    small = {n: t.to(dtype) for n, t in goldens.adapter_tensors().items()}
    attach_adapter(unet, save(small))
    found = {official_name(n): t for n, t in unet.state_dict().items() if ".easyref." in n}
    assert found
    assert all(torch.equal(t, small[f"unet.{n}"].float()) for n, t in found.items())


def test_offloaded_weights_are_asked_for_first(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(unet, torch.device("cpu"))
    before = modules(unet)
    with goldens.refused("not in memory (device meta)", "remove_all_hooks()"):
        attach_adapter(unet, checkpoint)
    assert modules(unet) == before
    accelerate.hooks.remove_hook_from_module(unet, recurse=True)
    attach_adapter(unet, checkpoint)
    accelerate.cpu_offload(unet, torch.device("cpu"))
    with goldens.refused("merge_lora", "not in memory"):
        merge_lora(unet)
    assert is_golden(unet)


class Wrapped(nn.Module):
    """A layer as PEFT wraps it: its weight can be read from outside and not be set."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def test_merging_reaches_the_weights_that_another_lora_wraps(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    for name in unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        attn.to_q, attn.to_k, attn.to_v = map(Wrapped, (attn.to_q, attn.to_k, attn.to_v))
        attn.to_out[0] = Wrapped(attn.to_out[0])
    attach_adapter(unet, checkpoint)
    assert is_golden(unet)
    merge_lora(unet)
    assert not any("_lora" in name for name in unet.state_dict())
    assert is_golden(unet)


def test_merging_that_breaks_off_changes_no_result_and_can_go_on(
    steered: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, multiply = 0, torch.Tensor.__matmul__

    def runs_out(*factors: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 7:
            raise torch.cuda.OutOfMemoryError
        return multiply(*factors)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", runs_out)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            merge_lora(steered)
    assert is_golden(steered)
    merge_lora(steered)
    assert not any("_lora" in name for name in steered.state_dict())
    assert is_golden(steered)


def test_weights_that_cannot_be_added_to_are_named_before_anything_changes(
    steered: UNet2DConditionModel,
) -> None:
    last = list(steered.attn_processors)[-1].removesuffix(".processor")
    linear = steered.get_submodule(last).to_v
    linear.weight = nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    before = {n: t.clone() for n, t in steered.state_dict().items()}
    with goldens.refused(f"{last}.to_v", "uint8"):
        merge_lora(steered)
    assert all(torch.equal(t, before[n]) for n, t in steered.state_dict().items())
