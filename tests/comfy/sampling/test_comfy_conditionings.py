"""Which reference tokens each conditioning gets, for any number of them and any caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import (
    TIMESTEP,
    Pack,
    apply,
    combine,
    euler,
    golden,
    guider,
    latents,
    predict,
    predict_with,
    random_text,
    sigmas,
    stock,
    text,
)
from goldens import difference

CFG = 5.0
EXACT = 1e-5
DUAL = "comfy_extras.nodes_custom_sampler.DualCFGGuider"

Truth = list[tuple[torch.Tensor, torch.Tensor]]


def test_both_texts_in_one_call(spy: Spy, model: Any, truth: Truth) -> None:
    predict(model, CFG)
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 1]
    assert spy.max_error(truth) < EXACT


def test_each_text_in_a_call_of_its_own(
    spy: Spy, model: Any, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ComfyUI does when there is no memory for both."""
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: float("inf"))
    apart = predict(model, CFG)
    calls = spy.texts(*(t for t, _ in truth))
    assert sorted(calls) == [(0,), (1,)]
    assert spy.max_error(truth) < EXACT
    monkeypatch.undo()
    assert difference(apart, predict(model, CFG)) < 5e-5


def test_every_latent_of_a_batch_gets_its_texts_tokens(spy: Spy, model: Any, truth: Truth) -> None:
    predict(model, CFG, latents(3))
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 0, 0, 1, 1, 1]
    assert spy.max_error(truth) < EXACT


def test_without_guidance_only_the_positive_text_runs(spy: Spy, model: Any, truth: Truth) -> None:
    predict(model, 1.0)
    assert spy.texts(*(t for t, _ in truth)) == [(0,)]
    assert spy.max_error(truth) < EXACT


def test_basic_guider(spy: Spy, model: Any, truth: Truth) -> None:
    predict_with(stock("comfy_extras.nodes_custom_sampler.BasicGuider", model, text()))
    assert spy.texts(*(t for t, _ in truth)) == [(0,)]
    assert spy.max_error(truth) < EXACT


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_guider_whose_order_is_negative_middle_positive(
    spy: Spy, model: Any, truth: Truth, tokens: Any, style: str
) -> None:
    middle = random_text(7)
    predict_with(stock(DUAL, model, text(), middle, text("negative"), 5.0, 3.0, style))
    truth = [*truth, (middle[0][0], tokens.cond)]
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 1, 2]
    assert spy.max_error(truth) < EXACT


def test_dual_guider_without_its_negative(spy: Spy, model: Any, truth: Truth, tokens: Any) -> None:
    """With cfg 1 the negative's list is left out of the call, so the others move."""
    middle = random_text(7)
    predict_with(stock(DUAL, model, text(), middle, text("negative"), 5.0, 1.0, "regular"))
    truth = [*truth, (middle[0][0], tokens.cond)]
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 2]
    assert spy.max_error(truth) < EXACT


def test_perp_neg_guider_whose_empty_text_is_negative(
    spy: Spy, model: Any, truth: Truth, tokens: Any
) -> None:
    empty = random_text(8)
    node = "comfy_extras.nodes_perpneg.PerpNegGuider"
    predict_with(stock(node, model, text(), text("negative"), empty, 5.0, 1.0))
    truth = [*truth, (empty[0][0], tokens.uncond)]
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 1, 2]
    assert spy.max_error(truth) < EXACT


def test_combined_texts_all_get_their_sides_tokens(
    spy: Spy, model: Any, truth: Truth, tokens: Any
) -> None:
    more, less = random_text(1), random_text(2)
    positive, negative = combine(text(), more), combine(text("negative"), less)
    predict(model, CFG, positive=positive, negative=negative)
    truth = [*truth, (more[0][0], tokens.cond), (less[0][0], tokens.uncond)]
    assert sorted(n for call in spy.texts(*(t for t, _ in truth)) for n in call) == [0, 1, 2, 3]
    assert spy.max_error(truth) < EXACT


def test_concatenated_texts(spy: Spy, model: Any, tokens: Any) -> None:
    longer = stock("nodes.ConditioningConcat", text(), random_text(1))
    predict(model, CFG, positive=longer)
    # ComfyUI repeats the shorter text so that both fit into one call.
    negative = golden("unet.negative_text_states").repeat(1, 2, 1)
    assert longer[0][0].shape == negative.shape
    assert spy.max_error([(longer[0][0], tokens.cond), (negative, tokens.uncond)]) < EXACT


def test_the_same_text_on_both_sides_keeps_its_roles(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Nothing but the role tells the rows apart."""
    same = text()
    model = apply(pack, unet, easyref, tokens)
    cond = predict(model, 1.0, positive=same)
    guided = predict(model, CFG, positive=same, negative=same)
    swapped = pack.part("easyref_core.tokens.reference_tokens").ReferenceTokens(
        tokens.uncond, tokens.cond, tokens.adapter
    )
    uncond = predict(apply(pack, unet, easyref, swapped), 1.0, positive=same)
    assert difference(guided, uncond + CFG * (cond - uncond)) < 5e-4
    assert difference(cond, uncond) > 0.1


def test_a_patch_that_asks_for_one_side_only_gets_that_sides_tokens(
    spy: Spy, model: Any, truth: Truth
) -> None:
    """As perturbed- and self-attention guidance do: the negative stands in list 0 then."""
    import comfy.samplers

    def ask_again(args: Any) -> Any:
        before = dict(args["model_options"]["transformer_options"])
        for expected in ("uncond", "cond"):
            comfy.samplers.calc_cond_batch(
                args["model"],
                [args[expected]],
                args["input"],
                args["sigma"],
                args["model_options"],
            )
        assert args["model_options"]["transformer_options"] == before, "notes leak to others"
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(ask_again)
    predict(model, CFG)
    assert spy.texts(*(t for t, _ in truth))[1:] == [(1,), (0,)]
    assert spy.max_error(truth) < EXACT


def test_conditionings_that_a_patch_adds_follow_the_usual_order(
    spy: Spy, model: Any, truth: Truth, tokens: Any
) -> None:
    """The run does not know them; list 0 is positive then, and every other negative."""
    import uuid

    import comfy.samplers

    def ask_with_copies(args: Any) -> Any:
        own = [[{**c, "uuid": uuid.uuid4()} for c in args[side]] for side in ("cond", "uncond")]
        details = args["input"], args["sigma"], args["model_options"]
        comfy.samplers.calc_cond_batch(args["model"], own, *details)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(ask_with_copies)
    predict(model, CFG)
    assert [sorted(call) for call in spy.texts(*(t for t, _ in truth))] == [[0, 1], [0, 1]]
    assert spy.max_error(truth) < EXACT


@pytest.mark.parametrize(
    ("lists", "roles"), [([0, 1], "pn"), ([1, 0], "np"), ([1], "n"), (None, "p")]
)
def test_a_model_call_around_the_sampler_follows_the_usual_order(
    spy: Spy, model: Any, truth: Truth, lists: list[int] | None, roles: str
) -> None:
    import comfy.model_management as mm

    mm.load_models_gpu([model])
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    if lists is not None:
        options["cond_or_uncond"] = lists
    sigma = sigmas(model, TIMESTEP)[:1].expand(len(roles))
    context = torch.cat([truth["pn".index(role)][0] for role in roles])
    model.model.apply_model(
        latents(1).expand(len(roles), -1, -1, -1),
        sigma,
        c_crossattn=context,
        y=torch.zeros(len(roles), 80),
        transformer_options=options,
    )
    assert spy.max_error(truth) < EXACT


def test_roles_hold_on_every_step(spy: Spy, model: Any, truth: Truth, unet: Any) -> None:
    steps = sigmas(unet, 901.0, 601.0, 301.0, 1.0)
    euler(guider(model, CFG), latents(2) * 14, steps)
    assert len(spy.texts(*(t for t, _ in truth))) == 4
    assert spy.max_error(truth) < 5e-5
