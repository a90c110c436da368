"""An identity LoRA is trained through references that are read without gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import goldens
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from golden_unet import golden, made

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.sdxl_diffusers.adapter import append_tokens, attach_adapter, new_adapter
from easyref_core.sdxl_diffusers.identity import attach_identity
from easyref_core.sdxl_diffusers.identity_latents import IdentityLatents
from easyref_core.sdxl_diffusers.identity_run import IdentityRun
from easyref_core.sdxl_diffusers.unet_layers import official_name

ALPHAS = EulerDiscreteScheduler().alphas_cumprod
TIMES = torch.tensor([800, 300, 500, 100])
SAMPLES = 2  # each at two noise levels


def trainable(unet: UNet2DConditionModel, kind: str) -> dict[str, torch.nn.Parameter]:
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(kind in name)
    return {n: p for n, p in unet.named_parameters() if p.requires_grad}


def loss(unet: UNet2DConditionModel, references: bool = True) -> torch.Tensor:
    """Of two samples at two noise levels, each with a reference of its own size."""
    generator = torch.Generator().manual_seed(0)
    sample, wanted = (torch.randn(4, 4, 16, 16, generator=generator) for _ in range(2))
    groups = [
        IdentityLatents((torch.randn(4, *size, generator=generator),), seed=9 + n)
        for n, size in enumerate(((16, 16), (8, 24)))
    ]
    kwargs = {"identity": IdentityRun(groups, ALPHAS)} if references else None
    found = unet(
        sample.to(unet.dtype),
        TIMES,
        encoder_hidden_states=_states(unet),
        added_cond_kwargs={
            "text_embeds": golden("pooled_text").expand(4, -1).to(unet.dtype),
            "time_ids": golden("time_ids").expand(4, -1).to(unet.dtype),
        },
        cross_attention_kwargs=kwargs,
    ).sample
    return (found - wanted).square().mean()


def _states(unet: UNet2DConditionModel) -> torch.Tensor:
    text, _ = append_tokens(unet, made(), golden("text_states"))
    return text.expand(4, -1, -1).to(unet.dtype)


@pytest.fixture
def trained(unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint) -> UNet2DConditionModel:
    """With the golden adapter and an identity LoRA that is no longer zero."""
    torch.manual_seed(0)
    attach_adapter(unet, checkpoint, new_identity_rank=3)
    attach_identity(unet)
    for parameter in trainable(unet, "_identity_lora.up").values():
        torch.nn.init.normal_(parameter, std=0.3)
    return unet


def gradients(unet: UNet2DConditionModel, kind: str) -> dict[str, torch.Tensor]:
    parameters = trainable(unet, kind)
    unet.zero_grad(set_to_none=True)
    loss(unet).backward()
    return {n: p.grad for n, p in parameters.items()}


def test_a_new_identity_lora_starts_from_zero(
    unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint
) -> None:
    attach_adapter(unet, checkpoint)
    attach_identity(unet)
    with torch.no_grad():
        wanted = loss(unet)
        assert wanted != loss(unet, references=False)
        attach_adapter(unet, checkpoint, new_identity_rank=3)
        assert torch.equal(loss(unet), wanted)
    names = {official_name(n) for n in unet.state_dict() if "_identity_lora" in n}
    assert len(names) == 4 * 8
    assert (
        "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_identity_lora.up.weight"
        in names
    )
    new_adapter(unet, 16, rank=2, identity_rank=2)
    assert {n for n in map(official_name, unet.state_dict()) if "_identity_lora" in n} == names
    new_adapter(unet, 16)
    assert not any("_identity_lora" in n for n in unet.state_dict())
    with goldens.refused("identity_rank is -1"):
        new_adapter(unet, 16, identity_rank=-1)


def test_a_trained_identity_lora_comes_back(
    trained: UNet2DConditionModel, plain: UNet2DConditionModel, save: Callable
) -> None:
    own = {f"unet.{official_name(n)}": t for n, t in trained.state_dict().items() if "_iden" in n}
    found = save(goldens.adapter_tensors() | {n: t.clone() for n, t in own.items()})
    assert (len(found.identity_lora), found.identity_lora_rank) == (8, 3)
    again = copy.deepcopy(plain)
    attach_adapter(again, found, new_identity_rank=7)
    attach_identity(again)
    with torch.no_grad():
        assert torch.equal(loss(again), loss(trained))


def test_gradients_are_those_of_finite_differences(trained: UNet2DConditionModel) -> None:
    """Along a random direction, in float64: the LoRA acts after the pass without gradients only."""
    trained.double()
    found = gradients(trained, "_identity_lora")
    assert len(found) == 32
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
    parameters = trainable(trained, "_identity_lora")
    generator = torch.Generator().manual_seed(1)
    directions = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()
    }

    @torch.no_grad()
    def moved(step: float) -> torch.Tensor:
        other = copy.deepcopy(trained)
        for name, parameter in other.named_parameters():
            if name in directions:
                parameter += step * directions[name]
        return loss(other)

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    wanted = sum((found[n] * d).sum() for n, d in directions.items())
    assert abs(slope - wanted) <= 1e-6 * abs(wanted)


def test_only_the_samples_pass_has_gradients(trained: UNet2DConditionModel) -> None:
    """The reference pass stores nothing for the backward pass."""
    seen = []
    trained.conv_out.register_forward_hook(lambda *given: seen.append(given[2].requires_grad))
    gradients(trained, "_identity_lora")
    assert seen == [False, False, True]  # two sizes, then the samples


def test_gradient_checkpointing_changes_no_gradient(trained: UNet2DConditionModel) -> None:
    wanted = gradients(trained, "_identity_lora")
    trained.enable_gradient_checkpointing()
    trained.train()
    found = gradients(trained, "_identity_lora")
    for name, gradient in wanted.items():
        assert goldens.difference(found[name], gradient) <= 1e-5


def test_autocast_loses_no_gradient_to_the_reference_pass(trained: UNet2DConditionModel) -> None:
    """Autocast keeps copies of weights; those of a pass without gradients are not used again."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(trained, "_lora.")
    lost = [n for n, gradient in found.items() if gradient is None or not gradient.abs().max() > 0]
    assert lost == []
