"""EasyRef Identity beside EasyRef Apply, ControlNets, areas, windows and other nodes' patches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import (
    Pack,
    apply,
    area,
    combine,
    euler,
    guider,
    latents,
    predict,
    random_text,
    sigmas,
    stock,
    stock_lora,
    text,
)
from goldens import difference
from identity_nodes import attention64, calls_of, identity, picture, projections_of

CFG = 5.0
CLOSE = 2e-4
EXACT = 2e-5

Wrap = Callable[[Any], Any]


def perturbed_attention(model: Any) -> Any:
    return stock("comfy_extras.nodes_pag.PerturbedAttentionGuidance", model, 3.0)


def self_attention_guidance(model: Any) -> Any:
    return stock("comfy_extras.nodes_sag.SelfAttentionGuidance", model, 0.5, 2.0)


def hypertile(model: Any) -> Any:
    return stock("comfy_extras.nodes_hypertile.HyperTile", model, 32, 1, 1, False)


def token_merging(model: Any) -> Any:
    """Every second position of the queries, as token merging shortens them."""
    model = model.clone()
    model.set_model_attn1_patch(lambda q, k, v, options: (q[:, ::2], k, v))
    model.set_model_attn1_output_patch(lambda out, options: out.repeat_interleave(2, dim=1))
    return model


def free_u(model: Any) -> Any:
    return stock("comfy_extras.nodes_freelunch.FreeU_V2", model, 1.3, 1.4, 0.9, 0.2)


def deep_shrink(model: Any) -> Any:
    node = "comfy_extras.nodes_model_downscale.PatchModelAddDownscale"
    return stock(node, model, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")


def v_prediction(model: Any) -> Any:
    node = "comfy_extras.nodes_model_advanced.ModelSamplingDiscrete"
    return stock(node, model, "v_prediction", True)


@pytest.fixture
def vae(demo: Any) -> Any:
    return demo.vae


@pytest.mark.parametrize(
    "wrap",
    [
        perturbed_attention,
        self_attention_guidance,
        free_u,
        deep_shrink,
        v_prediction,
        stock_lora,
    ],
)
def test_both_act_in_either_order(pack: Pack, unet: Any, vae: Any, wrap: Wrap) -> None:
    x = latents(2, 16, 24)
    before = predict(identity(pack, wrap(unet), vae), CFG, x)
    after = predict(wrap(identity(pack, unet, vae)), CFG, x)
    assert after.isfinite().all()
    assert difference(before, after) < CLOSE
    assert difference(predict(identity(pack, unet, vae), CFG, x), after) > 0.01
    assert difference(predict(wrap(unet), CFG, x), after) > 0.01


@pytest.mark.parametrize("wrap", [perturbed_attention, self_attention_guidance])
def test_guidance_that_calls_the_model_again_shares_the_pass(
    pack: Pack, unet: Any, vae: Any, wrap: Wrap
) -> None:
    model = wrap(identity(pack, unet, vae))
    with calls_of(unet) as calls:
        euler(guider(model, CFG), latents() * 14, sigmas(model, 901.0, 301.0))
    assert calls.rows == [1, 2, 1] * 2


def test_attention_that_guidance_replaces_stays_replaced(pack: Pack, unet: Any, vae: Any) -> None:
    """Perturbed attention: v in place of attention, then only what the references add."""
    model = identity(pack, perturbed_attention(unet), vae, weight=0.7)
    with projections_of(pack, unet) as layers:
        predict(model, CFG)
    middle = layers["mid_block.attentions.0.transformer_blocks.0.attn1"]
    q, k, v = (middle.outputs[name] for name in ("to_q", "to_k", "to_v"))
    assert [len(x) for x in q] == [1, 2, 1]  # pass, sample, perturbed
    own = attention64(q[2], k[3], v[3], middle.heads)
    joint = attention64(q[2], torch.cat([k[3], k[4]], 1), torch.cat([v[3], v[4]], 1), middle.heads)
    expected = v[3] + 0.7 * (joint - own)
    assert difference(middle.inputs["to_out"][2], expected) < EXACT


@pytest.mark.parametrize("order", ["before", "after"])
def test_beside_apply_both_do_what_they_do_alone(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, vae: Any, order: str
) -> None:
    """Identity's layers get no reference tokens, and Apply's no references' features."""
    spy = Spy(pack, easyref, unet)
    if order == "before":
        model = apply(pack, identity(pack, unet, vae), easyref, tokens)
    else:
        model = identity(pack, apply(pack, unet, easyref, tokens), vae)
    result = predict(spy.watch(model), CFG)
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    assert spy.max_error(truth) < EXACT
    assert difference(result, predict(apply(pack, unet, easyref, tokens), CFG)) > 0.01
    assert difference(result, predict(identity(pack, unet, vae), CFG)) > 0.01


def test_the_references_are_read_without_reference_tokens(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, vae: Any
) -> None:
    def features(model: Any) -> list[torch.Tensor]:
        with projections_of(pack, unet) as layers:
            predict(model, CFG)
        return [layer.inputs["to_k"][2] for layer in layers.values()]

    alone = features(identity(pack, unet, vae))
    steered = apply(pack, unet, easyref, tokens, lora_strength=0.0)
    beside = features(identity(pack, steered, vae))
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


def test_each_of_two_nodes_reads_without_the_other(pack: Pack, unet: Any, vae: Any) -> None:
    first = identity(pack, unet, vae, images=picture(1))
    both = identity(pack, first, vae, images=picture(2))
    with projections_of(pack, unet) as layers:
        predict(both, CFG)
        predict(first, CFG)
    for layer in layers.values():
        reads = [x for x in layer.inputs["to_q"] if len(x) == 1]
        assert torch.equal(reads[0], reads[2])


def test_beside_a_controlnet(pack: Pack, demo: Any) -> None:
    """The sample follows both; the ControlNet sees the sample alone."""
    outline = torch.zeros(1, 128, 128, 3)
    outline[:, 32:96, 32:36] = 1
    node = "nodes.ControlNetApplyAdvanced"
    plain, negative = (random_text(number, pooled=64) for number in (1, 2))
    controlled = stock(node, plain, negative, demo.control_net, outline, 1.0, 0.0, 1.0)
    texts = {"positive": controlled, "negative": negative}
    x = latents()
    with calls_of(demo.model) as calls:
        both = predict(identity(pack, demo.model, demo.vae), CFG, x, **texts)
    reading, *sampling = calls.others
    assert reading["control"] is None
    assert any(call["control"] is not None for call in sampling)
    assert difference(both, predict(demo.model, CFG, x, **texts)) > 0.01
    without = predict(
        identity(pack, demo.model, demo.vae), CFG, x, positive=plain, negative=negative
    )
    assert difference(both, without) > 0.01


def test_areas_share_the_pass_and_a_mask_lies_where_it_is_in_the_whole_picture(
    pack: Pack, unet: Any, vae: Any
) -> None:
    left = area(random_text(1), (0.5, 1.0, 0.0, 0.0))
    right = area(random_text(2), (0.5, 1.0, 0.5, 0.0))
    positive, x = combine(left, right), latents(1, 16, 32)
    mask = torch.zeros(1, 16, 32)
    mask[:, :, 16:] = 1

    def outputs(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(text, output) of each row of the areas."""
        found: list[torch.Tensor] = []
        hook = unet.model.diffusion_model.register_forward_hook(lambda m, a, o: found.append(o))
        with calls_of(unet) as calls:
            predict(model, CFG, x, positive=positive)
        hook.remove()
        assert sum(len(o) for o, seen in zip(found, calls.others, strict=True)) == sum(calls.rows)
        rows = []
        for out, seen, inputs in zip(found, calls.others, calls.inputs, strict=True):
            if inputs.shape[-1] == 16 and "y" in seen:
                rows += zip(seen["context"], out, strict=True)
        return rows

    def of(rows: list[Any], states: torch.Tensor) -> list[torch.Tensor]:
        return [out for context, out in rows if torch.equal(context, states[0])]

    plain = outputs(unet)
    masked = outputs(identity(pack, unet, vae, mask=mask))
    for states, acts in ((left[0][0], False), (right[0][0], True)):
        changed = max(
            float((a - b).abs().max())
            for a, b in zip(of(plain, states)[-1:], of(masked, states)[-1:], strict=True)
        )
        assert (changed > 0.01) == acts
    with calls_of(unet) as calls:
        predict(identity(pack, unet, vae), CFG, x, positive=positive)
    assert [tuple(x.shape[-2:]) for x in calls.inputs].count((24, 24)) == 1
    assert len(calls.inputs) > 2


def test_the_first_prompt_that_acts_is_the_one_the_references_are_read_with(
    pack: Pack, unet: Any, vae: Any
) -> None:
    early, late = random_text(1), random_text(2)
    node = "nodes.ConditioningSetTimestepRange"
    positive = combine(stock(node, early, 0.0, 0.5), stock(node, late, 0.5, 1.0))
    model = identity(pack, unet, vae)
    with calls_of(unet) as calls:
        steps = sigmas(model, 901.0, 101.0)
        euler(guider(model, CFG, positive=positive), latents() * 14, steps)
    read = [other["context"][0] for other in calls.others if len(other["context"]) == 1]
    assert torch.equal(read[0], early[0][0][0])
    assert torch.equal(read[1], late[0][0][0])


def test_windows_of_frames_share_the_pass(pack: Pack, unet: Any, vae: Any) -> None:
    node = "comfy_extras.nodes_context_windows.ContextWindowsManualNode"
    masks = torch.rand(6, 8, 8)
    model = identity(pack, unet, vae, mask=masks)
    x = latents(6)
    expected = predict(model, CFG, x)
    windows = stock(node, model, 3, 1, "standard_static", 1, False, "flat", 0, False)
    with calls_of(unet) as calls:
        found = predict(windows, CFG, x)
    assert difference(found, expected) < CLOSE
    assert calls.rows.count(1) == 1
    assert len(calls.rows) > 2


def test_merged_positions_attend_and_a_mask_among_them_is_left_out(
    pack: Pack, unet: Any, vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    merged = token_merging(identity(pack, unet, vae))
    assert difference(predict(merged, CFG), predict(token_merging(unet), CFG)) > 0.01
    pack.part("nodes.sampling.identity_layer")._warn_of_positions.cache_clear()
    masked = token_merging(identity(pack, unet, vae, mask=torch.rand(1, 8, 8)))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(predict(masked, CFG), predict(token_merging(unet), CFG))
    assert sum("Token Merging" in message for message in caplog.messages) == 1


def test_a_mask_lies_where_it_is_if_another_node_shortens_the_keys(
    pack: Pack, unet: Any, vae: Any
) -> None:
    def shorter_keys(model: Any) -> Any:
        model = model.clone()
        model.set_model_attn1_patch(lambda q, k, v, options: (q, k[:, ::2], v[:, ::2]))
        return model

    model = shorter_keys(identity(pack, unet, vae, mask=torch.ones(1, 8, 8)))
    unmasked = predict(shorter_keys(identity(pack, unet, vae)), CFG)
    assert difference(predict(model, CFG), unmasked) < CLOSE
    assert difference(unmasked, predict(shorter_keys(unet), CFG)) > 0.01


def test_references_are_scaled_as_a_node_tells_the_model_to(
    pack: Pack, unet: Any, vae: Any
) -> None:
    node = "comfy_extras.nodes_model_advanced.ModelSamplingContinuousEDM"
    other = stock(node, unet, "edm_playground_v2.5", 120.0, 0.002)
    steps = torch.tensor([10.0, 1.0])
    with calls_of(unet) as calls:
        for _ in range(2):  # the second time the model is loaded
            result = euler(guider(identity(pack, other, vae), CFG), latents() * 10, steps)
    assert result.isfinite().all()
    sampling = other.get_model_object("model_sampling")
    latent = other.get_model_object("latent_format").process_in(vae.encode(picture(1)))
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    noisy = sampling.noise_scaling(steps[:1], noise, latent)
    for read in calls.inputs[::2]:  # pictures have 8 bits
        assert difference(read, sampling.calculate_input(steps[:1], noisy)) < 1e-2


def test_a_layer_whose_rows_are_rearranged_is_left_out_with_a_warning(
    pack: Pack, unet: Any, vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pack.part("nodes.sampling.batch_rows").warn_of_rows.cache_clear()
    x = latents(1, 16, 24)
    with caplog.at_level(logging.WARNING):
        found = predict(hypertile(identity(pack, unet, vae)), CFG, x)
    assert found.isfinite().all()
    assert any("another node changed the batch" in message for message in caplog.messages)


def test_a_compiled_model_gives_the_same(pack: Pack, unet: Any, vae: Any) -> None:
    expected = predict(identity(pack, unet, vae), CFG)
    compiled = stock("comfy_extras.nodes_torch_compile.TorchCompileModel", unet, "eager")
    for model in (
        identity(pack, compiled, vae),
        stock(
            "comfy_extras.nodes_torch_compile.TorchCompileModel", identity(pack, unet, vae), "eager"
        ),
    ):
        assert difference(predict(model, CFG), expected) < CLOSE


def test_a_model_for_inpainting_reads_references_as_pictures_to_be_made(
    pack: Pack, unet: Any, vae: Any
) -> None:
    """It reads a mask and a masked picture beside the latents."""
    first = unet.model.diffusion_model.input_blocks[0][0]
    noise = torch.Generator().manual_seed(9)
    more = torch.randn((len(first.weight), 5, 3, 3), generator=noise) * 0.1
    first.weight = torch.nn.Parameter(torch.cat([first.weight, more], 1), requires_grad=False)
    unet.model.set_inpaint()
    plain = predict(unet, CFG)
    with calls_of(unet) as calls:
        found = predict(identity(pack, unet, vae), CFG)
    reading = calls.inputs[0]
    blank = unet.model.blank_inpaint_image_like(torch.ones(1, 4, 16, 16))
    assert reading.shape == (1, 9, 16, 16)
    assert torch.equal(reading[:, 4:5], torch.ones(1, 1, 16, 16))
    assert torch.equal(reading[:, 5:], blank)
    assert difference(found, plain) > 0.01
