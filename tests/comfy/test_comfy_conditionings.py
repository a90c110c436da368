"""Which reference tokens each conditioning gets, however many there are and whoever calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import Seen, Spy
from comfyhost import (
    TIMESTEP,
    Pack,
    apply,
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


@pytest.fixture
def spy(pack: Pack, easyref: Any, unet: Any) -> Spy:
    return Spy(pack, easyref, unet)


@pytest.fixture
def model(pack: Pack, spy: Spy, unet: Any, easyref: Any, tokens: Any) -> Any:
    """The golden model, steered and watched."""
    return spy.watch(apply(pack, unet, easyref, tokens))


@pytest.fixture
def truth(tokens: Any) -> Truth:
    return [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]


def combine(first: Any, second: Any) -> Any:
    return stock("nodes.ConditioningCombine", first, second)


def area(conditioning: Any, part: tuple[float, float, float, float], strength: float = 1.0) -> Any:
    """On (width, height, x, y) of the picture, as parts of it."""
    return stock("nodes.ConditioningSetAreaPercentage", conditioning, *part, strength)


def test_both_texts_in_one_call(spy: Spy, model: Any, truth: Truth) -> None:
    predict(model, CFG)
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 1]
    assert spy.wrong_by(truth) < EXACT


def test_each_text_in_a_call_of_its_own(
    spy: Spy, model: Any, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ComfyUI does when there is no memory for both."""
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: float("inf"))
    apart = predict(model, CFG)
    calls = spy.texts(*(t for t, _ in truth))
    assert sorted(calls) == [(0,), (1,)]
    assert spy.wrong_by(truth) < EXACT
    monkeypatch.undo()
    assert difference(apart, predict(model, CFG)) < 5e-5


def test_every_latent_of_a_batch_gets_its_texts_tokens(spy: Spy, model: Any, truth: Truth) -> None:
    predict(model, CFG, latents(3))
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 0, 0, 1, 1, 1]
    assert spy.wrong_by(truth) < EXACT


def test_without_guidance_only_the_positive_text_runs(spy: Spy, model: Any, truth: Truth) -> None:
    predict(model, 1.0)
    assert spy.texts(*(t for t, _ in truth)) == [(0,)]
    assert spy.wrong_by(truth) < EXACT


def test_basic_guider(spy: Spy, model: Any, truth: Truth) -> None:
    predict_with(stock("comfy_extras.nodes_custom_sampler.BasicGuider", model, text()))
    assert spy.texts(*(t for t, _ in truth)) == [(0,)]
    assert spy.wrong_by(truth) < EXACT


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_guider_whose_order_is_negative_middle_positive(
    spy: Spy, model: Any, truth: Truth, tokens: Any, style: str
) -> None:
    middle = random_text(7)
    predict_with(stock(DUAL, model, text(), middle, text("negative"), 5.0, 3.0, style))
    truth = [*truth, (middle[0][0], tokens.cond)]
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 1, 2]
    assert spy.wrong_by(truth) < EXACT


def test_dual_guider_without_its_negative(spy: Spy, model: Any, truth: Truth, tokens: Any) -> None:
    """With cfg 1 the negative's list is left out of the call, so the others move."""
    middle = random_text(7)
    predict_with(stock(DUAL, model, text(), middle, text("negative"), 5.0, 1.0, "regular"))
    truth = [*truth, (middle[0][0], tokens.cond)]
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 2]
    assert spy.wrong_by(truth) < EXACT


def test_perp_neg_guider_whose_empty_text_is_negative(
    spy: Spy, model: Any, truth: Truth, tokens: Any
) -> None:
    empty = random_text(8)
    node = "comfy_extras.nodes_perpneg.PerpNegGuider"
    predict_with(stock(node, model, text(), text("negative"), empty, 5.0, 1.0))
    truth = [*truth, (empty[0][0], tokens.uncond)]
    assert sorted(spy.texts(*(t for t, _ in truth))[0]) == [0, 1, 2]
    assert spy.wrong_by(truth) < EXACT


def test_combined_texts_all_get_their_sides_tokens(
    spy: Spy, model: Any, truth: Truth, tokens: Any
) -> None:
    more, less = random_text(1), random_text(2)
    positive, negative = combine(text(), more), combine(text("negative"), less)
    predict(model, CFG, positive=positive, negative=negative)
    truth = [*truth, (more[0][0], tokens.cond), (less[0][0], tokens.uncond)]
    assert sorted(n for call in spy.texts(*(t for t, _ in truth)) for n in call) == [0, 1, 2, 3]
    assert spy.wrong_by(truth) < EXACT


def test_concatenated_texts(spy: Spy, model: Any, tokens: Any) -> None:
    longer = stock("nodes.ConditioningConcat", text(), random_text(1))
    predict(model, CFG, positive=longer)
    # ComfyUI repeats the shorter text so that both fit into one call.
    negative = golden("unet.negative_text_states").repeat(1, 2, 1)
    assert longer[0][0].shape == negative.shape
    assert spy.wrong_by([(longer[0][0], tokens.cond), (negative, tokens.uncond)]) < EXACT


def test_the_same_text_on_both_sides_keeps_its_roles(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Nothing but the role tells the rows apart."""
    same = text()
    model = apply(pack, unet, easyref, tokens)
    cond = predict(model, 1.0, positive=same)
    guided = predict(model, CFG, positive=same, negative=same)
    swapped = pack.part("easyref_core.tokens").ReferenceTokens(
        tokens.uncond, tokens.cond, tokens.adapter
    )
    uncond = predict(apply(pack, unet, easyref, swapped), 1.0, positive=same)
    assert difference(guided, uncond + CFG * (cond - uncond)) < 5e-4
    assert difference(cond, uncond) > 0.1


LEFT, RIGHT = (0.5, 1.0, 0.0, 0.0), (0.5, 1.0, 0.5, 0.0)
CORNER, INNER = (0.75, 0.75, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0)


@pytest.mark.parametrize(
    "layout",
    [
        "positive areas beside the whole",
        "positive areas alone",
        "areas on both sides",
        "a positive area in a negative one",
        "a negative area in a positive one",
    ],
)
def test_areas_and_the_counterparts_that_comfyui_copies(
    spy: Spy, model: Any, truth: Truth, tokens: Any, layout: str
) -> None:
    """ComfyUI copies an area's conditioning, its uuid too, into the other side's list."""
    more, less = random_text(1), random_text(2)
    positive, negative = {
        "positive areas beside the whole": (combine(text(), area(more, LEFT)), text("negative")),
        "positive areas alone": (
            combine(area(text(), LEFT), area(more, RIGHT)),
            text("negative"),
        ),
        "areas on both sides": (
            combine(text(), area(more, LEFT)),
            combine(text("negative"), area(less, RIGHT)),
        ),
        "a positive area in a negative one": (
            combine(area(more, INNER), text()),
            area(text("negative"), CORNER),
        ),
        "a negative area in a positive one": (
            area(text(), CORNER),
            combine(area(less, INNER), text("negative")),
        ),
    }[layout]
    predict(model, CFG, latents(1, 24, 24), positive=positive, negative=negative)
    truth = [*truth, (more[0][0], tokens.cond), (less[0][0], tokens.uncond)]
    found = {n for call in spy.texts(*(t for t, _ in truth)) for n in call}
    assert found >= {0, 1}
    assert len({seen.grid for seen in spy.seen}) > 1, "no area was cut"
    assert spy.wrong_by(truth) < EXACT


def test_masked_texts(spy: Spy, model: Any, truth: Truth, tokens: Any) -> None:
    more = random_text(1)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    for bounds in ("default", "mask bounds"):
        masked = stock("nodes.ConditioningSetMask", more, mask, bounds, 0.7)
        predict(model, CFG, latents(1, 24, 24), positive=combine(text(), masked))
    truth = [*truth, (more[0][0], tokens.cond)]
    assert len({seen.grid for seen in spy.seen}) > 1, "no area was cut"
    assert spy.wrong_by(truth) < EXACT


HEIGHT, WIDTH = 24, 48  # of the latent; the golden UNet's attention sees half as many cells


def right_third(parts: list[tuple[torch.Tensor, tuple[float, ...]]]) -> Any:
    """Scale of a mask whose right third is white, for rows whose text has an area of its own.

    All sizes here are multiples of what the UNet shrinks by, so every cell is 0 or 1.
    """

    def scale(seen: Seen) -> torch.Tensor:
        height, width = seen.grid
        rows = []
        for context in seen.context:
            own = [part for states, part in parts if torch.equal(states[0], context)]
            left = round(own[0][2] * WIDTH / 2) if own else 0
            columns = (torch.arange(width) + left >= WIDTH // 3).float()
            rows.append(columns.expand(height, width).reshape(-1, 1))
        return torch.stack(rows)

    return scale


@pytest.mark.parametrize("part", [LEFT, RIGHT, (1.0, 0.5, 0.0, 0.5), (0.5, 0.5, 0.25, 0.25)])
@pytest.mark.parametrize("finer", [1, 4])
def test_a_reference_mask_is_cut_to_the_area_where_it_lies(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, part: tuple[float, ...], finer: int
) -> None:
    more = random_text(1)
    mask = torch.zeros(1, HEIGHT * finer, WIDTH * finer)
    mask[:, :, WIDTH * finer * 2 // 3 :] = 1
    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens, mask=mask))
    positive = combine(text(), area(more, part))
    predict(model, x=latents(1, HEIGHT, WIDTH), positive=positive)
    assert len({seen.grid for seen in spy.seen}) == 2
    truth = [(text()[0][0], tokens.cond), (more[0][0], tokens.cond)]
    assert spy.wrong_by(truth, right_third([(more[0][0], part)])) < EXACT


def test_two_areas_of_one_size_get_their_own_parts_of_a_mask(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    left, right = random_text(1), random_text(2)
    mask = torch.zeros(1, 2 * HEIGHT, 2 * WIDTH)
    mask[:, :, WIDTH * 4 // 3 :] = 1
    spy = Spy(pack, easyref, unet)
    model = spy.watch(apply(pack, unet, easyref, tokens, mask=mask))
    positive = combine(area(left, LEFT), area(right, RIGHT))
    predict(model, x=latents(1, HEIGHT, WIDTH), positive=positive)
    truth = [(left[0][0], tokens.cond), (right[0][0], tokens.cond)]
    parts = [(left[0][0], LEFT), (right[0][0], RIGHT)]
    assert spy.wrong_by(truth, right_third(parts)) < EXACT


def test_the_same_area_of_a_larger_picture_gets_another_part_of_a_mask(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """What a mask keeps of one run must not leak into the next."""
    mask = torch.rand(1, 64, 64)
    corner = stock("nodes.ConditioningSetArea", random_text(1), 128, 128, 0, 0, 1.0)
    positive = combine(text(), corner)
    model = apply(pack, unet, easyref, tokens, mask=mask)
    for size in ((24, 24), (24, 48), (48, 24)):
        x = latents(1, *size)
        fresh = apply(pack, unet, easyref, tokens, mask=mask.clone())
        found = predict(model, CFG, x, positive=positive)
        assert torch.equal(found, predict(fresh, CFG, x, positive=positive))


def test_a_patch_that_asks_for_one_side_only_gets_that_sides_tokens(
    spy: Spy, model: Any, truth: Truth
) -> None:
    """As perturbed- and self-attention guidance do: the negative stands in list 0 then."""
    import comfy.samplers

    def ask_again(args: Any) -> Any:
        before = dict(args["model_options"]["transformer_options"])
        for wanted in ("uncond", "cond"):
            comfy.samplers.calc_cond_batch(
                args["model"],
                [args[wanted]],
                args["input"],
                args["sigma"],
                args["model_options"],
            )
        assert args["model_options"]["transformer_options"] == before, "notes leak to others"
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(ask_again)
    predict(model, CFG)
    assert spy.texts(*(t for t, _ in truth))[1:] == [(1,), (0,)]
    assert spy.wrong_by(truth) < EXACT


def test_conditionings_that_a_patch_brings_itself_follow_the_usual_order(
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
    assert spy.wrong_by(truth) < EXACT


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
    assert spy.wrong_by(truth) < EXACT


def test_roles_hold_on_every_step(spy: Spy, model: Any, truth: Truth, unet: Any) -> None:
    steps = sigmas(unet, 901.0, 601.0, 301.0, 1.0)
    euler(guider(model, CFG), latents(2) * 14, steps)
    assert len(spy.texts(*(t for t, _ in truth))) == 4
    assert spy.wrong_by(truth) < 5e-5
