"""ComfyUI's own model nodes before and after Apply: they act, and the references act too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import (
    Pack,
    apply,
    euler,
    golden_unet,
    guider,
    latents,
    predict,
    stock,
    stock_lora,
    stock_lora_weights,
    text,
)
from goldens import difference

CFG = 5.0
EXACT = 2e-5
CLOSE = 2e-4

Wrap = Callable[[Any], Any]


def perturbed_attention(model: Any) -> Any:
    return stock("comfy_extras.nodes_pag.PerturbedAttentionGuidance", model, 3.0)


def self_attention_guidance(model: Any) -> Any:
    return stock("comfy_extras.nodes_sag.SelfAttentionGuidance", model, 0.5, 2.0)


def hypertile(model: Any) -> Any:
    return stock("comfy_extras.nodes_hypertile.HyperTile", model, 32, 1, 1, False)


def token_merging(model: Any) -> Any:
    return stock("comfy_extras.nodes_tomesd.TomePatchModel", model, 0.5)


def free_u(model: Any) -> Any:
    return stock("comfy_extras.nodes_freelunch.FreeU_V2", model, 1.3, 1.4, 0.9, 0.2)


def deep_shrink(model: Any, factor: float = 2.0) -> Any:
    node = "comfy_extras.nodes_model_downscale.PatchModelAddDownscale"
    return stock(node, model, 3, factor, 0.0, 1.0, True, "bicubic", "bicubic")


def rescaled_guidance(model: Any) -> Any:
    return stock("comfy_extras.nodes_model_advanced.RescaleCFG", model, 0.7)


def other_sampling(model: Any) -> Any:
    node = "comfy_extras.nodes_model_advanced.ModelSamplingDiscrete"
    return stock(node, model, "v_prediction", True)


def few_steps(model: Any) -> Any:
    """As for LCM, Turbo and Lightning."""
    node = "comfy_extras.nodes_model_advanced.ModelSamplingDiscrete"
    return stock(node, model, "lcm", False)


@pytest.mark.parametrize(
    "wrap",
    [
        perturbed_attention,
        self_attention_guidance,
        hypertile,
        free_u,
        deep_shrink,
        rescaled_guidance,
        other_sampling,
        few_steps,
        stock_lora,
    ],
)
def test_both_act_in_either_order(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, wrap: Wrap
) -> None:
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    x = latents(2, 16, 24)
    before = predict(apply(pack, wrap(unet), easyref, tokens), CFG, x)
    after = predict(wrap(apply(pack, unet, easyref, tokens)), CFG, x)
    assert after.isfinite().all()
    assert difference(before, after) < CLOSE
    assert difference(predict(apply(pack, unet, easyref, tokens), CFG, x), after) > 0.01
    assert difference(predict(wrap(unet), CFG, x), after) > 0.01
    spy = Spy(pack, easyref, unet)
    predict(spy.watch(wrap(apply(pack, unet, easyref, tokens))), CFG, x)
    assert spy.max_error(truth) < EXACT


def test_a_merged_model_is_steered_in_either_order(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Before the merge the LoRA is a part of what is merged, so it is left out here."""
    other = stock_lora(golden_unet(pack))

    def merge(model: Any) -> Any:
        return stock("comfy_extras.nodes_model_merging.ModelMergeSimple", model, other, 0.6)

    before = predict(merge(apply(pack, unet, easyref, tokens, lora_strength=0.0)), CFG)
    after = predict(apply(pack, merge(unet), easyref, tokens, lora_strength=0.0), CFG)
    assert difference(before, after) < CLOSE
    assert difference(predict(merge(unet), CFG), after) > 0.01
    steered = apply(pack, unet, easyref, tokens, lora_strength=0.0)
    assert difference(predict(steered, CFG), after) > 0.01


@pytest.mark.parametrize("sampler", ["lcm", "euler_ancestral", "dpmpp_sde"])
def test_samplers_of_few_steps_without_guidance(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, sampler: str
) -> None:
    """Without guidance the model is called with the positive side alone."""
    import comfy.samplers

    def sample(model: Any) -> torch.Tensor:
        cfg_guider = guider(few_steps(model), 1.0)
        steps = comfy.samplers.calculate_sigmas(
            cfg_guider.model_patcher.get_model_object("model_sampling"), "sgm_uniform", 4
        )
        picture = torch.zeros(1, 4, 16, 16)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            how = comfy.samplers.ksampler(sampler)
            return cfg_guider.sample(latents(), picture, how, steps, disable_pbar=True, seed=2)

    spy = Spy(pack, easyref, unet)
    result = sample(spy.watch(apply(pack, unet, easyref, tokens)))
    assert result.isfinite().all()
    assert spy.max_error([(text()[0][0], tokens.cond)]) < EXACT
    assert difference(result, sample(unet)) > 0.01


def test_token_merging_runs(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> None:
    """It merges only at the full resolution, where SDXL has no attention."""
    expected = predict(apply(pack, unet, easyref, tokens), CFG)
    merged = apply(pack, token_merging(unet), easyref, tokens)
    assert torch.equal(predict(merged, CFG), expected)


@pytest.mark.parametrize("wrap", [perturbed_attention, self_attention_guidance])
def test_guidance_nodes_call_the_model_again_with_the_right_side(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, wrap: Wrap
) -> None:
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    spy = Spy(pack, easyref, unet)
    predict(spy.watch(wrap(apply(pack, unet, easyref, tokens))), CFG)
    both, again = spy.texts(*(t for t, _ in truth))
    assert sorted(both) == [0, 1]
    assert again == ((0,) if wrap is perturbed_attention else (1,))
    assert spy.max_error(truth) < EXACT


@pytest.mark.parametrize(("factor", "grid"), [(2.0, (4, 12)), (1.5, (5, 16))])
def test_a_mask_acts_at_the_right_place_where_deep_shrink_changes_the_resolution(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, factor: float, grid: tuple[int, int]
) -> None:
    mask = torch.zeros(1, 64, 96)
    mask[:, :, :48] = 1
    spy = Spy(pack, easyref, unet)
    model = spy.watch(deep_shrink(apply(pack, unet, easyref, tokens, mask=mask), factor))
    predict(model, x=latents(1, 16, 48))
    assert {record.grid for record in spy.records} == {grid, (8, 24)}

    def left_half(record: Any) -> torch.Tensor:
        height, width = record.grid
        white = (torch.arange(width) < width // 2).float()
        return white.expand(height, width).reshape(1, -1, 1)

    assert spy.max_error([(text()[0][0], tokens.cond)], left_half) < EXACT


def test_the_window_follows_a_replaced_noise_schedule(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """percent_to_sigma of the schedule that runs, not of the one the model came with."""
    model = other_sampling(apply(pack, unet, easyref, tokens, end_percent=0.5))
    schedule = model.get_model_object("model_sampling")
    middle = float(schedule.percent_to_sigma(0.5))
    assert abs(middle - unet.model.model_sampling.percent_to_sigma(0.5)) > 0.01
    for sigma, scale in ((middle * 1.01, 1.0), (middle * 0.99, 0.0)):
        spy = Spy(pack, easyref, unet)
        steps = torch.tensor([sigma, 0.0])
        euler(guider(spy.watch(model), CFG), latents() * sigma, steps)
        truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
        assert spy.max_error(truth, scale) < EXACT


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.0])
def test_references_act_on_a_merged_model(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, ratio: float
) -> None:
    other = golden_unet(pack)
    noise = torch.Generator().manual_seed(9)
    for weight in other.model.diffusion_model.parameters():
        weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=noise))
    merged = stock("comfy_extras.nodes_model_merging.ModelMergeSimple", unet, other, ratio)
    steered = apply(pack, merged, easyref, tokens)
    spy = Spy(pack, easyref, unet)
    result = predict(spy.watch(steered), CFG)
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    assert spy.max_error(truth) < EXACT
    alone = {1.0: unet, 0.0: other}.get(ratio)
    if alone is not None:
        assert difference(result, predict(apply(pack, alone, easyref, tokens), CFG)) < CLOSE
    else:
        assert difference(result, predict(apply(pack, unet, easyref, tokens), CFG)) > 0.01


def test_a_lora_hook_on_one_text_only(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> None:
    """ComfyUI then runs each side in a call of its own, with other weights."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(stock_lora_weights(), 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(text(), hooks)
    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens))
    hooked = predict(model, CFG, positive=positive)
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    assert sorted(spy.texts(*(t for t, _ in truth))) == [(0,), (1,)]
    assert difference(hooked, predict(model, CFG)) > 0.01
    # After the run the hook's weights are gone, so layers whose to_out it changed are left out.
    spy.records = [record for record in spy.records if not record.layer.startswith("mid_block")]
    assert spy.max_error(truth) < EXACT


def test_several_samplers_and_schedules_run_with_window_and_mask(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    import comfy.samplers

    model = apply(pack, unet, easyref, tokens, start_percent=0.1, mask=torch.ones(1, 8, 8))
    plain = apply(pack, unet, easyref, tokens, start_percent=0.1)
    schedule = comfy.samplers.calculate_sigmas(unet.model.model_sampling, "karras", 4)
    for name in ("dpmpp_2m", "dpmpp_2s_ancestral", "uni_pc", "euler_cfg_pp"):
        results = [
            guider(m, CFG).sample(
                latents(2),
                torch.zeros(2, 4, 16, 16),
                comfy.samplers.sampler_object(name),
                schedule,
                disable_pbar=True,
                seed=7,
            )
            for m in (model, plain)
        ]
        assert difference(*results) < 0.01 * float(results[1].std())


def test_keys_and_values_follow_the_precision_the_model_computes_in(
    pack: Pack, unet: Any, fresh_easyref: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pack.part("nodes.host.key_value_cache")
    project, dtypes = store.project_tokens, []
    monkeypatch.setattr(
        store, "project_tokens", lambda *args: dtypes.append(args[-1]) or project(*args)
    )
    exact = predict(apply(pack, unet, fresh_easyref, tokens), CFG)
    steered = apply(pack, unet, fresh_easyref, tokens)
    half = stock("comfy_extras.nodes_model_advanced.ModelComputeDtype", steered, "bf16")
    result = predict(half, CFG)
    assert dtypes == [torch.float32, torch.bfloat16]
    assert 1e-4 < difference(result, exact) < 0.1 * float(exact.abs().max())
