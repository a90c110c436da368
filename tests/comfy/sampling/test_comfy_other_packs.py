"""Other packs' patches on a model: theirs and ours both work.

The stand-ins here follow what the packs do, not their code.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import Pack, apply, euler, golden_unet, guider, latents, predict, sigmas, text
from goldens import difference

CFG = 5.0
EXACT = 2e-5


@pytest.fixture
def truth(tokens: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]


class HalfText(Spy):
    """Another pack whose plain function stands on every slot and halves the text."""

    def attend(self, q: Any, k: Any, v: Any, options: Any) -> torch.Tensor:
        return 0.5 * super().attend(q, k, v, options)


@pytest.mark.parametrize("order", ["before Apply", "after Apply"])
def test_a_plain_function_on_the_slot_is_called_and_its_result_kept(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, truth: Any, order: str
) -> None:
    other = HalfText(pack, easyref, unet)
    if order == "before Apply":
        model = apply(pack, other.watch(unet), easyref, tokens)
    else:
        model = other.watch(apply(pack, unet, easyref, tokens))
    predict(model, CFG)
    assert len(other.records) == len(easyref.checkpoint.cross_attention)
    assert other.max_error(truth) < EXACT


def test_a_function_for_a_whole_block_is_called_and_its_result_kept(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, truth: Any
) -> None:
    """ComfyUI falls back from (block, number, index) to (block, number)."""
    other = HalfText(pack, easyref, unet)
    model = unet.clone()
    model.set_model_attn2_patch(other._note_context)
    model.set_model_attn2_output_patch(other._note_output)
    for block in {block[:2] for block in other.blocks}:
        model.set_model_attn2_replace(other._note_attention, *block)
    predict(apply(pack, model, easyref, tokens), CFG)
    assert len(other.records) == len(easyref.checkpoint.cross_attention)
    assert other.max_error(truth) < EXACT


class Stack:
    """IPAdapter_plus's convention: one object for each slot, to which the next ones are added."""

    def __init__(self, share: float) -> None:
        self.shares = [share]

    def add(self, share: float) -> None:
        self.shares.append(share)

    def __call__(self, q: Any, k: Any, v: Any, options: Any) -> torch.Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        return optimized_attention(q, k, v, options["n_heads"]) + sum(self.shares) * q


def add_to_stack(model: Any, blocks: Any, share: float) -> Any:
    """As IPAdapter_plus adds itself: `.add` on whatever it finds on the slot."""
    model = model.clone()
    options = model.model_options["transformer_options"].copy()
    replace = options["patches_replace"] = options.get("patches_replace", {}).copy()
    slots = replace["attn2"] = replace.get("attn2", {}).copy()
    for block in blocks:
        if block in slots:
            slots[block].add(share)
        else:
            slots[block] = Stack(share)
    model.model_options["transformer_options"] = options
    return model


def test_objects_with_an_add_method_compose_in_every_order(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    blocks = Spy(pack, easyref, unet).blocks
    results = []
    for order in ("ssa", "sas", "ass"):
        model = unet
        for step in order:
            if step == "s":
                model = add_to_stack(model, blocks, 0.4)
            else:
                model = apply(pack, model, easyref, tokens)
        results.append(predict(model, CFG))
        slots = model.model_options["transformer_options"]["patches_replace"]["attn2"]
        assert {tuple(stack.shares) for stack in slots.values()} == {(0.4, 0.4)}
    assert difference(results[0], results[1]) < EXACT
    assert difference(results[0], results[2]) < EXACT
    assert difference(results[0], predict(apply(pack, unet, easyref, tokens), CFG)) > 0.1


def test_apply_leaves_the_attention_slots_free(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    model = apply(pack, unet, easyref, tokens, mask=torch.ones(1, 8, 8))
    assert model.model_options == {"transformer_options": {}}
    predict(model, CFG)
    assert model.model_options == {"transformer_options": {}}
    assert model.object_patches == {}


def couple(model: Any) -> Any:
    """Attention couple: every row attends to two texts, then the results are blended."""
    model = model.clone()

    def double(n: Any, context: Any, value: Any, options: Any) -> tuple[Any, ...]:
        return n.repeat(2, 1, 1), torch.cat([context, -context]), torch.cat([value, -value])

    def blend(n: torch.Tensor, options: Any) -> torch.Tensor:
        first, second = n.chunk(2)
        return 0.7 * first + 0.3 * second

    model.set_model_attn2_patch(double)
    model.set_model_attn2_output_patch(blend)
    return model


def test_rows_of_a_changed_batch_get_no_references_and_one_warning(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pack.part("nodes.sampling.batch_rows").warn_of_rows.cache_clear()
    coupled = couple(apply(pack, unet, easyref, tokens, lora_strength=0.0))
    steps = sigmas(unet, 801.0, 401.0)
    with caplog.at_level(logging.WARNING):
        result = euler(guider(coupled, CFG), latents(2), steps)
    assert difference(result, euler(guider(couple(unet), CFG), latents(2), steps)) < EXACT
    warnings = [r for r in caplog.records if "EasyRef" in r.getMessage()]
    assert len(warnings) == 1
    assert "left out" in warnings[0].getMessage()


def test_a_replaced_forward_of_the_unet_still_gets_the_references(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, truth: Any
) -> None:
    original = unet.model.diffusion_model.forward
    calls = []

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(x.shape)
        return original(x, *args, **kwargs)

    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens))
    model.add_object_patch("diffusion_model.forward", forward)
    predict(model, CFG)
    assert calls == [(2, 4, 16, 16)]
    assert spy.max_error(truth) < EXACT


def split(details: Any, row: int, **noted: Any) -> dict[str, Any]:
    """The arguments of one row of a model call, as passed by a pack that runs rows one by one."""
    own = {n: v[row : row + 1] if torch.is_tensor(v) else v for n, v in details.items()}
    own["transformer_options"] = {**details["transformer_options"], **noted}
    return own


@pytest.mark.parametrize("told", ["lists and uuids", "lists"])
def test_a_wrapper_that_runs_each_side_alone_still_gets_its_references(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, truth: Any, told: str
) -> None:
    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens))

    def each_alone(apply_model: Any, args: Any) -> torch.Tensor:
        outs = []
        for row, number in enumerate(args["cond_or_uncond"]):
            note = {"cond_or_uncond": [number]}
            if told != "lists":
                note["uuids"] = [args["c"]["transformer_options"]["uuids"][row]]
            own = slice(row, row + 1)
            details = split(args["c"], row, **note)
            outs.append(apply_model(args["input"][own], args["timestep"][own], **details))
        return torch.cat(outs)

    model.set_model_unet_function_wrapper(each_alone)
    result = predict(model, CFG)
    assert sorted(spy.texts(*(t for t, _ in truth))) == [(0,), (1,)]
    assert spy.max_error(truth) < EXACT
    assert difference(result, predict(apply(pack, unet, easyref, tokens), CFG)) < 5e-5


def test_rows_that_a_wrapper_runs_alone_without_a_note_get_no_references_and_one_warning(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pack.part("nodes.sampling.batch_rows").warn_of_rows.cache_clear()

    def row_by_row(apply_model: Any, args: Any) -> torch.Tensor:
        rows = range(args["input"].shape[0])
        own = [(args["input"][r : r + 1], args["timestep"][r : r + 1]) for r in rows]
        return torch.cat([apply_model(*own[r], **split(args["c"], r)) for r in rows])

    model = apply(pack, unet, easyref, tokens, lora_strength=0.0)
    model.set_model_unet_function_wrapper(row_by_row)
    with caplog.at_level(logging.WARNING):
        result = predict(model, CFG)
    assert difference(result, predict(unet, CFG)) < 5e-5
    assert [r.getMessage().count("left out") for r in caplog.records] == [1]


@pytest.mark.parametrize("positionally", [True, False])
@pytest.mark.parametrize("order", ["before Apply", "after Apply"])
def test_another_wrapper_around_the_model_call(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, truth: Any, order: str, positionally: bool
) -> None:
    """It may pass the options on by position or by name; they never contain our patches."""
    from comfy.patcher_extension import WrappersMP

    unchanged = []

    def wrapper(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = ("c_concat", "c_crossattn", "control", "transformer_options")
        given = dict(zip(names, args, strict=False)) | kwargs
        before = dict(given["transformer_options"].get("patches_replace", {}))
        if positionally:
            first = [given.pop(name, None) for name in names]
            out = executor(x, t, *first, **given)
            options = first[-1]
        else:
            out = executor(x, t, **given)
            options = given["transformer_options"]
        unchanged.append(options.get("patches_replace", {}) == before)
        return out

    spy = Spy(pack, easyref, unet)
    model = unet.clone()
    if order == "before Apply":
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    model = spy.watch(apply(pack, model, easyref, tokens))
    if order == "after Apply":
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", wrapper)
    predict(model, CFG)
    assert unchanged == [True]
    assert spy.max_error(truth) < EXACT


def test_a_second_unet_in_the_same_run_is_not_steered(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """A model that another pack calls in a step (a refiner, a guide) is not steered."""
    guide = golden_unet(pack)
    plain = predict(guide)
    model = apply(pack, unet, easyref, tokens)
    result = []

    def ask_the_guide(args: Any) -> Any:
        result.append(predict(guide))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(ask_the_guide)
    predict(model, CFG)
    assert len(result) == 1
    assert torch.equal(result[0], plain)
