"""EasyRef Apply: weight, LoRA, several Apply nodes, and the model it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import (
    GOLDEN_MLLM,
    Pack,
    apply,
    euler,
    golden,
    guider,
    latents,
    predict,
    put_adapter,
    random_tokens,
    sigmas,
    text,
)
from goldens import adapter_tensors, difference

CLOSE = 5e-5
CFG = 5.0
STEPS = (901.0, 701.0, 501.0, 301.0, 101.0)


@pytest.fixture
def second_adapter(pack: Pack) -> Any:
    """Another adapter for the golden UNet: other projections, another LoRA, another identity."""
    tensors = adapter_tensors()
    generator = torch.Generator().manual_seed(11)
    for name, tensor in tensors.items():
        if name.startswith("unet."):
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = noise * tensor.std()
    name = put_adapter(pack, "second.safetensors", tensors)
    return pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")


def test_weight_and_lora_strength_zero_change_nothing_at_all(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    model = apply(pack, unet, easyref, tokens, weight=0.0, lora_strength=0.0)
    assert torch.equal(predict(model, CFG), predict(unet, CFG))


def test_twice_half_is_once_whole(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> None:
    half = apply(pack, unet, easyref, tokens, weight=0.5)
    twice = apply(pack, half, easyref, tokens, weight=0.5)
    once = apply(pack, unet, easyref, tokens, weight=1.0)
    assert difference(predict(twice, CFG), predict(once, CFG)) < CLOSE
    assert difference(predict(half, CFG), predict(once, CFG)) > 0.1


def test_a_negative_weight_takes_the_references_away(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    spy = Spy(pack, easyref, unet)
    predict(spy.watch(apply(pack, unet, easyref, tokens, weight=-0.7)), CFG)
    truth = [(golden("unet.text_states"), tokens.cond)]
    truth += [(golden("unet.negative_text_states"), tokens.uncond)]
    assert spy.max_error(truth, -0.7) < 1e-5
    assert spy.max_error(truth, 0.7) > 0.1


def test_apply_nodes_with_different_tokens_add_up(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """In every layer each node's references are added to the text's attention."""
    other = random_tokens(pack, easyref, seed=5)
    model = apply(pack, unet, easyref, tokens, weight=0.8)
    model = apply(pack, model, easyref, other, weight=-0.3)
    spy = Spy(pack, easyref, unet)
    predict(spy.watch(model))
    assert {record.layer for record in spy.records} == set(easyref.checkpoint.cross_attention)
    for record in spy.records:
        shares = 0.8 * spy.references(record, tokens.cond) - 0.3 * spy.references(
            record, other.cond
        )
        assert difference(record.out, spy.to_out(record, record.text + shares)) < 1e-5


def test_lora_is_merged_once_however_often_it_is_applied(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    model = unet
    for _ in range(3):
        model = apply(pack, model, easyref, tokens, weight=0.0)
    assert {len(patches) for patches in model.patches.values()} == {1}
    assert difference(predict(model), golden("unet.noise_pred.scale_0.0")) < 1e-4


def test_a_later_lora_strength_replaces_the_earlier_one(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    first = apply(pack, unet, easyref, tokens, weight=0.0, lora_strength=1.0)
    later = apply(pack, first, easyref, tokens, weight=0.0, lora_strength=0.4)
    direct = apply(pack, unet, easyref, tokens, weight=0.0, lora_strength=0.4)
    expected = predict(direct)
    assert difference(predict(later), expected) < 1e-6
    assert difference(predict(first), golden("unet.noise_pred.scale_0.0")) < 1e-4
    assert difference(expected, golden("unet.noise_pred.scale_0.0")) > 0.05


def test_a_later_lora_strength_of_zero_removes_the_lora(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    merged = apply(pack, unet, easyref, tokens, weight=0.0)
    assert merged.patches
    removed = apply(pack, merged, easyref, tokens, weight=0.0, lora_strength=0.0)
    assert not removed.patches
    plain = predict(unet)
    assert difference(predict(merged), plain) > 0.1
    assert torch.equal(predict(removed), plain)


def test_loras_of_two_adapters_are_both_merged(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, second_adapter: Any
) -> None:
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_lora"
    plain = unet.model.state_dict()[key].clone()
    model = apply(pack, unet, easyref, tokens, weight=0.0, lora_strength=0.5)
    other = random_tokens(pack, second_adapter, seed=1)
    model = apply(pack, model, second_adapter, other, weight=0.0, lora_strength=2.0)
    predict(model)
    expected = plain.clone()
    for adapter, strength in ((easyref, 0.5), (second_adapter, 2.0)):
        halves = adapter.checkpoint.lora[name.removeprefix("unet.").split(".processor")[0]]["to_v"]
        weights = adapter.checkpoint.file.read(halves)
        expected += strength * weights["up"] @ weights["down"]
    assert difference(unet.model.state_dict()[key], expected) < 1e-6


def test_adapters_that_differ_in_their_lora_only_are_told_apart(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    tensors = {n: t * 2 if "_lora.up" in n else t for n, t in adapter_tensors().items()}
    name = put_adapter(pack, "stronger_lora.safetensors", tensors)
    stronger = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    assert stronger.checkpoint.identity == easyref.checkpoint.identity
    model = apply(pack, unet, easyref, tokens, weight=0.0)
    both = apply(pack, model, stronger, tokens, weight=0.0)
    assert {len(patches) for patches in both.patches.values()} == {2}
    three = apply(pack, unet, easyref, tokens, weight=0.0, lora_strength=3.0)
    expected = predict(three)
    assert difference(predict(both), expected) < 1e-3  # three times the LoRA, summed otherwise
    assert difference(predict(model), expected) > 0.1


def test_references_of_two_adapters_add_up(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, second_adapter: Any
) -> None:
    other = random_tokens(pack, second_adapter, seed=1)
    model = apply(pack, unet, easyref, tokens, weight=0.8)
    model = apply(pack, model, second_adapter, other, weight=0.6)
    spy, second = (Spy(pack, adapter, unet) for adapter in (easyref, second_adapter))
    predict(spy.watch(model))
    for record in spy.records:
        own, others = (
            spy.references(record, tokens.cond),
            second.references(record, other.cond),
        )
        expected = spy.to_out(record, record.text + 0.8 * own + 0.6 * others)
        assert difference(record.out, expected) < 1e-5
        assert difference(own, others) > 0.01


def test_the_given_model_is_left_as_it_was(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    plain = predict(unet, CFG)
    before = unet.patches_uuid, dict(unet.attachments)
    steered = apply(pack, unet, easyref, tokens, mask=torch.ones(1, 8, 8), end_percent=0.9)
    assert difference(predict(steered, CFG), plain) > 0.1
    assert (unet.patches_uuid, dict(unet.attachments)) == before
    assert not unet.patches
    assert not any(w for kinds in unet.wrappers.values() for w in kinds.values())
    assert unet.model_options == {"transformer_options": {}}
    assert torch.equal(predict(unet, CFG), plain)


def test_a_copy_of_a_steered_model_steers_too_and_is_its_own(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    steered = apply(pack, unet, easyref, tokens, mask=torch.ones(1, 8, 8), end_percent=0.9)
    expected = predict(steered, CFG)
    copy = steered.clone().clone()
    assert torch.equal(predict(copy, CFG), expected)
    more = apply(pack, copy, easyref, random_tokens(pack, easyref, seed=2))
    assert difference(predict(more, CFG), expected) > 0.1
    assert torch.equal(predict(steered, CFG), expected)


def test_copies_share_tokens_and_keys_instead_of_copying_them(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Older ComfyUIs deep-copy model_options; reference tokens must not be copied."""
    import copy

    from comfy.patcher_extension import WrappersMP

    steered = apply(pack, unet, easyref, tokens, mask=torch.ones(1, 8, 8))
    (application,) = steered.get_wrappers(WrappersMP.APPLY_MODEL, "easyref")
    assert steered.clone().get_wrappers(WrappersMP.APPLY_MODEL, "easyref") == [application]
    assert copy.deepcopy({"wrappers": [application]})["wrappers"] == [application]


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.3, 0.7), (0.5, 1.0), (0.2, 0.2)])
def test_the_window_is_a_switch_step_by_step(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, start: float, end: float
) -> None:
    sampling = unet.model.model_sampling
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    window = apply(pack, unet, easyref, tokens, start_percent=start, end_percent=end)
    always, never = (apply(pack, unet, easyref, tokens, weight=w) for w in (1.0, 0.0))
    steps = sigmas(unet, *STEPS)
    x = latents() * torch.sqrt(steps[0] ** 2 + 1)
    result = euler(guider(window, CFG), x, steps)
    inside = [bool(last <= sigma <= first) for sigma in steps[:-1]]
    assert start == end or (any(inside) and not all(inside))
    for number, acts in enumerate(inside):
        x = euler(guider(always if acts else never, CFG), x, steps[number : number + 2])
    assert difference(result, x) < 1e-3
    everywhere = euler(guider(always, CFG), latents() * torch.sqrt(steps[0] ** 2 + 1), steps)
    assert difference(result, everywhere) > 0.1


def test_a_start_after_the_end_is_refused(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> None:
    with pack.refused("start_percent (0.8)", "end_percent (0.3)"):
        apply(pack, unet, easyref, tokens, start_percent=0.8, end_percent=0.3)


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_a_batch_of_token_groups_is_one_group_a_latent(
    pack: Pack, unet: Any, easyref: Any, cfg: float
) -> None:
    groups = [random_tokens(pack, easyref, seed) for seed in (1, 2, 3)]
    batch = pack.part("easyref_core.tokens.reference_tokens").stack_tokens(groups)
    x = latents(3)
    together = predict(apply(pack, unet, easyref, batch), cfg, x)
    for number, group in enumerate(groups):
        alone = predict(apply(pack, unet, easyref, group), cfg, x[number : number + 1])
        assert difference(together[number : number + 1], alone) < CLOSE
    one_for_all = predict(apply(pack, unet, easyref, groups[0]), cfg, x)
    assert difference(one_for_all[:1], together[:1]) < CLOSE
    assert difference(one_for_all[1:2], together[1:2]) > 0.1


def test_more_token_groups_than_latents_are_refused(pack: Pack, unet: Any, easyref: Any) -> None:
    model = apply(pack, unet, easyref, random_tokens(pack, easyref, seed=1, batch=3))
    with pack.refused("3 groups", "2 latents"):
        predict(model, CFG, latents(2))


def test_settings_of_the_texts_do_not_reach_the_tokens(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """A text's own start and end leave out its rows, and nothing else."""
    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens))
    negative = text("negative", start_percent=0.9, end_percent=1.0)
    predict(model, CFG, negative=negative, timestep=601.0)
    assert spy.texts(golden("unet.text_states"), golden("unet.negative_text_states")) == [(0,)]
    assert spy.max_error([(golden("unet.text_states"), tokens.cond)]) < 1e-5
