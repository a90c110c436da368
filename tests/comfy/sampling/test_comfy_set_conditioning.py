"""EasyRef Set Conditioning: which rows get the tokens that a prompt carries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attention_spy import LayerRecord, Spy
from comfyhost import (
    GOLDEN_MLLM,
    Pack,
    apply,
    area,
    combine,
    euler,
    golden,
    guider,
    latents,
    predict,
    predict_with,
    put_adapter,
    random_text,
    random_tokens,
    sigmas,
    stock,
    text,
)
from goldens import adapter_tensors, difference

CFG = 5.0
EXACT = 1e-5
CLOSE = 5e-5
LEFT, RIGHT = (0.5, 1.0, 0.0, 0.0), (0.5, 1.0, 0.5, 0.0)
DUAL = "comfy_extras.nodes_custom_sampler.DualCFGGuider"

POSITIVE, NEGATIVE = golden("unet.text_states"), golden("unet.negative_text_states")


@pytest.fixture
def groups(pack: Pack, easyref: Any) -> list[Any]:
    return [random_tokens(pack, easyref, seed) for seed in (1, 2, 3)]


def carry(pack: Pack, conditioning: Any, tokens: Any, weight: float = 1.0, **settings: Any) -> Any:
    return pack.run("EasyRefSetConditioning", conditioning, tokens, weight, **settings)


def another_adapter(pack: Pack, name: str) -> Any:
    tensors = adapter_tensors()
    noise = torch.Generator().manual_seed(5)
    for key, tensor in tensors.items():
        if key.startswith("unet."):
            tensors[key] = torch.randn(tensor.shape, generator=noise) * tensor.std()
    return pack.run("EasyRefLoader", put_adapter(pack, name, tensors), GOLDEN_MLLM, "auto")


def steered(pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, **settings: Any) -> Any:
    return spy.watch(apply(pack, unet, easyref, tokens, **settings))


def test_a_prompts_tokens_take_the_place_of_the_nodes_own(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    model = steered(pack, spy, unet, easyref, tokens)
    plain = random_text(7)
    positive = combine(carry(pack, text(), groups[0]), plain)
    predict(model, CFG, latents(2), positive=positive)
    truth = [(POSITIVE, groups[0].cond), (plain[0][0], tokens.cond), (NEGATIVE, tokens.uncond)]
    assert spy.max_error(truth) < EXACT
    assert {len(call) for call in spy.texts(*(t for t, _ in truth))} == {6}, "an extra model pass"


def test_without_tokens_of_the_node_the_negative_gets_the_prompts_unconditional_half(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, groups: list[Any]
) -> None:
    model = steered(pack, spy, unet, easyref, None)
    result = predict(model, CFG, positive=carry(pack, text(), groups[0]))
    truth = [(POSITIVE, groups[0].cond), (NEGATIVE, groups[0].uncond)]
    assert spy.max_error(truth) < EXACT
    assert difference(result, predict(apply(pack, unet, easyref, groups[0]), CFG)) < CLOSE


def test_prompts_with_tokens_are_separate_runs_combined(
    pack: Pack, unet: Any, easyref: Any, groups: list[Any]
) -> None:
    other = random_text(7)
    both = combine(carry(pack, text(), groups[0]), carry(pack, other, groups[1], 0.5))
    result = predict(apply(pack, unet, easyref, None), positive=both)
    first = predict(apply(pack, unet, easyref, groups[0]), positive=text())
    second = predict(apply(pack, unet, easyref, groups[1], weight=0.5), positive=other)
    assert difference(result, (first + second) / 2) < CLOSE


def test_a_negative_prompts_tokens_are_references_to_avoid(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    model = steered(pack, spy, unet, easyref, tokens)
    predict(model, CFG, negative=carry(pack, text("negative"), groups[0]))
    assert spy.max_error([(POSITIVE, tokens.cond), (NEGATIVE, groups[0].cond)]) < EXACT


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_guider(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, groups: list[Any], style: str
) -> None:
    model = steered(pack, spy, unet, easyref, None)
    middle = random_text(7)
    dual_guider = stock(
        DUAL,
        model,
        carry(pack, text(), groups[0]),
        carry(pack, middle, groups[1]),
        carry(pack, text("negative"), groups[2]),
        5.0,
        3.0,
        style,
    )
    predict_with(dual_guider)
    truth = [
        (POSITIVE, groups[0].cond),
        (middle[0][0], groups[1].cond),
        (NEGATIVE, groups[2].cond),
    ]
    assert spy.max_error(truth) < EXACT


@pytest.mark.parametrize("order", ["area, then tokens", "tokens, then area"])
def test_areas_and_their_counterparts(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any], order: str
) -> None:
    """The copy in the negative list is the counterpart of the area's tokens."""

    def part(conditioning: Any, group: Any, place: Any) -> Any:
        if order == "area, then tokens":
            return carry(pack, area(conditioning, place), group)
        return area(carry(pack, conditioning, group), place)

    other = random_text(7)
    model = steered(pack, spy, unet, easyref, None)
    positive = combine(part(text(), groups[0], LEFT), part(other, groups[1], RIGHT))
    predict(model, CFG, latents(1, 24, 24), positive=positive)
    assert spy.records
    truth = [(POSITIVE, [groups[0].cond]), (other[0][0], [groups[1].cond])]
    # A negative row belongs to one of the areas; which one, the next test says.
    truth += [(NEGATIVE, [groups[0].uncond, groups[1].uncond])]
    for record in spy.records:
        for row, context in enumerate(record.context):
            one = one_row(record, row)
            (known,) = (own for states, own in truth if torch.equal(states[0], context))
            expected = [spy.to_out(one, one.text + spy.references(one, c)) for c in known]
            assert min(difference(one.out, w) for w in expected) < EXACT


def one_row(record: LayerRecord, row: int) -> LayerRecord:
    own = slice(row, row + 1)
    parts = (t[own] for t in (record.context, record.q, record.text))
    return LayerRecord(record.layer, *parts, record.heads, record.options, record.out[own])


def test_each_areas_counterpart_has_that_areas_unconditional_half(
    pack: Pack, groups: list[Any]
) -> None:
    """Unless the negative prompt whose text it has carries tokens to avoid."""
    conditionings = pack.part("nodes.sampling.conditionings")
    effect = pack.part("nodes.sampling.weights").Effect
    text_of_negative = object()
    entry = {
        "uuid": "p",
        "area": (8, 8, 0, 0),
        conditionings.CARRIED: (effect(groups[0], ()),),
    }
    plain = {"uuid": "n", "model_conds": {"c_crossattn": text_of_negative}}
    copied = {**entry, "model_conds": {"c_crossattn": text_of_negative}}
    avoided = {**plain, conditionings.CARRIED: (effect(groups[1], ()),)}

    def rows(negatives: list[Any]) -> list[Any]:
        run = conditionings.Run({"p": False, "n": True})
        batch = conditionings.CondBatch.of(run, [[entry], negatives], latents())
        return [batch.rows_of(1, negative["uuid"]).tokens for negative in negatives]

    own, (counterpart,) = rows([plain, copied])
    assert own == ()
    assert (counterpart.effect.tokens, counterpart.unconditional) == (groups[0], True)
    _, (counterpart,) = rows([avoided, copied])
    assert (counterpart.effect.tokens, counterpart.unconditional) == (groups[1], False)


def test_an_area_of_the_negative_does_not_bring_its_tokens_to_the_positive(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    """The copy in the positive list has the positive's text, so it gets the positive's tokens."""
    model = steered(pack, spy, unet, easyref, tokens)
    negative = carry(pack, area(text("negative"), LEFT), groups[1])
    positive = carry(pack, text(), groups[0])
    less = random_text(9)
    predict(
        model,
        CFG,
        latents(1, 24, 24),
        positive=positive,
        negative=combine(negative, less),
    )
    truth = [
        (POSITIVE, groups[0].cond),
        (NEGATIVE, groups[1].cond),
        (less[0][0], tokens.uncond),
    ]
    assert len({record.grid for record in spy.records}) > 1, "no area was cut"
    assert spy.max_error(truth) < EXACT


def test_masked_prompts(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    more = random_text(1)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    model = steered(pack, spy, unet, easyref, tokens)
    masked = carry(pack, stock("nodes.ConditioningSetMask", more, mask, "default", 0.7), groups[0])
    predict(model, CFG, latents(1, 24, 24), positive=combine(text(), masked))
    truth = [(POSITIVE, tokens.cond), (more[0][0], groups[0].cond), (NEGATIVE, tokens.uncond)]
    assert spy.max_error(truth) < EXACT


def test_concatenated_prompts_keep_the_first_ones_tokens(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    model = steered(pack, spy, unet, easyref, tokens)
    longer = stock("nodes.ConditioningConcat", carry(pack, text(), groups[0]), random_text(1))
    predict(model, CFG, positive=longer)
    truth = [(longer[0][0], groups[0].cond), (NEGATIVE.repeat(1, 2, 1), tokens.uncond)]
    assert spy.max_error(truth) < EXACT


def test_prompts_for_parts_of_the_sampling(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, groups: list[Any]
) -> None:
    """Other references from the middle of a run on."""
    late = random_text(7)
    scheduled = combine(
        stock("nodes.ConditioningSetTimestepRange", carry(pack, text(), groups[0]), 0.0, 0.5),
        stock("nodes.ConditioningSetTimestepRange", carry(pack, late, groups[1]), 0.5, 1.0),
    )
    model = steered(pack, spy, unet, easyref, None)
    steps = sigmas(unet, 901.0, 301.0)
    euler(guider(model, 1.0, scheduled), latents() * 14, steps)
    assert spy.texts(POSITIVE, late[0][0]) == [(0,), (1,)]
    assert spy.max_error([(POSITIVE, groups[0].cond), (late[0][0], groups[1].cond)]) < CLOSE


def test_prompts_with_different_numbers_of_tokens_run_in_one_call(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    long = pack.part("easyref_core.tokens.reference_tokens").ReferenceTokens(
        torch.cat([groups[0].cond, groups[1].cond], 1),
        torch.cat([groups[0].uncond, groups[1].uncond], 1),
        tokens.adapter,
    )
    other = random_text(7)
    positive = combine(carry(pack, text(), long, 0.5), other)
    predict(steered(pack, spy, unet, easyref, tokens), CFG, latents(2), positive=positive)
    (call,) = spy.texts(POSITIVE, other[0][0], NEGATIVE)
    assert sorted(call) == [0, 0, 1, 1, 2, 2]
    for record in spy.records:
        for row, context in enumerate(record.context):
            one = one_row(record, row)
            if torch.equal(context, POSITIVE[0]):
                share = 0.5 * spy.references(one, long.cond)
            elif torch.equal(context, NEGATIVE[0]):
                share = spy.references(one, tokens.uncond)
            else:
                share = spy.references(one, tokens.cond)
            assert difference(one.out, spy.to_out(one, one.text + share)) < EXACT


def test_a_group_a_latent(pack: Pack, unet: Any, easyref: Any, groups: list[Any]) -> None:
    batch = pack.part("easyref_core.tokens.reference_tokens").stack_tokens(groups)
    x = latents(3)
    model = apply(pack, unet, easyref, None)
    together = predict(model, CFG, x, positive=carry(pack, text(), batch))
    for number, group in enumerate(groups):
        own = slice(number, number + 1)
        alone = predict(apply(pack, unet, easyref, group), CFG, x[own])
        assert difference(together[own], alone) < CLOSE
    with pack.refused("3 groups", "2 latents"):
        predict(model, CFG, latents(2), positive=carry(pack, text(), batch))


def test_settings_of_apply_multiply_and_regions_still_add(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    region = pack.run("EasyRefRegion", groups[1], torch.ones(1, 8, 8), 0.3)
    model = steered(pack, spy, unet, easyref, tokens, weight=0.5, regions=region)
    predict(model, positive=carry(pack, text(), groups[0], 0.8))
    for record in spy.records:
        shares = 0.4 * spy.references(record, groups[0].cond)
        shares = shares + 0.15 * spy.references(record, groups[1].cond)
        assert difference(record.out, spy.to_out(record, record.text + shares)) < EXACT


def test_weight_zero_leaves_a_prompt_without_references(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    model = steered(pack, spy, unet, easyref, tokens)
    predict(model, positive=carry(pack, text(), groups[0], 0.0))
    assert all(torch.equal(record.out, spy.to_out(record, record.text)) for record in spy.records)


def test_layer_weights_of_a_prompt(pack: Pack, demo: Any, demo_easyref: Any) -> None:
    weights = pack.part("easyref_core.adapter.layer_weights").LayerWeights(
        {"output_1": 0.0, "middle": 2}
    )
    first, second = (random_tokens(pack, demo_easyref, seed) for seed in (1, 2))
    prompt = random_text(1, pooled=64)
    spy = Spy(pack, demo_easyref, demo.model)
    model = spy.watch(apply(pack, demo.model, demo_easyref, first))
    predict(model, positive=carry(pack, prompt, second, layer_weights=weights))

    def scale(record: LayerRecord) -> float:
        module = record.layer.partition(".transformer_blocks")[0]
        return {"up_blocks.0.attentions.1": 0.0, "mid_block.attentions.0": 2.0}.get(module, 1.0)

    assert spy.max_error([(prompt[0][0], second.cond)], scale) < EXACT


def test_several_apply_nodes_with_one_adapter_add_them_once(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    """The last one's settings count, as for the LoRA; the others add nothing to these rows."""
    model = apply(pack, unet, easyref, tokens, weight=0.9)
    model = steered(pack, spy, model, easyref, groups[1], weight=0.5)
    predict(model, CFG, positive=carry(pack, text(), groups[0]))
    for record in spy.records:
        for row, context in enumerate(record.context):
            one = one_row(record, row)
            if torch.equal(context, POSITIVE[0]):
                shares = 0.5 * spy.references(one, groups[0].cond)
            else:
                shares = 0.9 * spy.references(one, tokens.uncond)
                shares = shares + 0.5 * spy.references(one, groups[1].uncond)
            assert difference(one.out, spy.to_out(one, one.text + shares)) < EXACT


def test_tokens_of_two_adapters_on_one_prompt(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, groups: list[Any]
) -> None:
    another = another_adapter(pack, "second_carried.safetensors")
    foreign = random_tokens(pack, another, seed=4)
    model = apply(pack, apply(pack, unet, easyref, None), another, None)
    spy, second = Spy(pack, easyref, unet), Spy(pack, another, unet)
    prompt = carry(pack, carry(pack, text(), groups[0]), foreign, 0.5)
    prompt = carry(pack, prompt, groups[1])  # takes the place of the first
    predict(spy.watch(model), positive=prompt)
    for record in spy.records:
        shares = spy.references(record, groups[1].cond)
        shares = shares + 0.5 * second.references(record, foreign.cond)
        assert difference(record.out, spy.to_out(record, record.text + shares)) < EXACT


def test_the_given_conditioning_stays_and_copies_share_the_tokens(
    pack: Pack, groups: list[Any]
) -> None:
    given = text()
    before = dict(given[0][1])
    carrying = carry(pack, given, groups[0])
    assert given[0][1] == before
    assert carrying[0][0] is given[0][0]
    assert set(carrying[0][1]) - set(before) == {"easyref_tokens"}
    copied = copy.deepcopy(carrying[0][1]["easyref_tokens"])
    assert copied == carrying[0][1]["easyref_tokens"]
    with pytest.raises(AttributeError):
        copied[0].weight = 2.0


def test_a_model_that_went_through_no_apply_is_not_changed(
    pack: Pack, unet: Any, groups: list[Any]
) -> None:
    assert torch.equal(predict(unet, positive=carry(pack, text(), groups[0])), predict(unet))


# Bad input


def test_tokens_of_another_adapter_are_refused_before_the_first_step(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    another = another_adapter(pack, "third_carried.safetensors")
    foreign = random_tokens(pack, another, seed=4)
    model = apply(pack, unet, easyref, tokens)
    calls = []
    model.set_model_unet_function_wrapper(lambda *args: calls.append(args))
    with pack.refused("third_carried.safetensors", easyref.checkpoint.name, "Add an EasyRef Apply"):
        predict(model, CFG, negative=carry(pack, text("negative"), foreign))
    assert not calls


def test_a_sampler_of_another_kind_refuses_at_the_first_call(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Without a guider nothing is known before ComfyUI computes a batch of conditionings."""
    import comfy.samplers

    another = another_adapter(pack, "fourth_carried.safetensors")
    entry = dict(carry(pack, text(), random_tokens(pack, another, seed=4))[0][1])
    entry |= {"uuid": "own", "model_conds": {}}
    model = apply(pack, unet, easyref, tokens)
    options = {"transformer_options": {"wrappers": model.wrappers}}
    with pack.refused("fourth_carried.safetensors", easyref.checkpoint.name):
        comfy.samplers.calc_cond_batch(
            model.model, [[entry]], latents(), sigmas(unet, 601.0), options
        )


def test_layer_weights_that_the_model_lacks_are_refused_before_the_first_step(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    layers = pack.part("nodes.host.unet_layers")
    core = pack.part("easyref_core.adapter.layer_weights")
    present = {layers.group_of(x.block) for x in layers.cross_attention_layers(unet).values()}
    lacking = next(group for group in core.GROUPS if group not in present)
    prompt = carry(pack, text(), tokens, layer_weights=core.LayerWeights({lacking: 0.0}))
    with pack.refused(lacking, "has no such layers"):
        predict(apply(pack, unet, easyref, None), positive=prompt)


def test_an_empty_conditioning_is_refused(pack: Pack, tokens: Any) -> None:
    with pack.refused("conditioning is empty"):
        carry(pack, [], tokens)
