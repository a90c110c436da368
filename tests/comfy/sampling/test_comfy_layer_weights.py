"""Layer weights: the node's output, and in which layers references act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import LayerRecord, Spy
from comfyhost import Pack, apply, latents, predict, random_text, random_tokens
from goldens import difference

CFG = 5.0
EXACT = 2e-5
GROUPS = ["input_4", "input_5", "input_7", "input_8", "middle", *(f"output_{n}" for n in range(6))]
MODULES = {
    "input_4": "down_blocks.1.attentions.0",
    "input_5": "down_blocks.1.attentions.1",
    "input_7": "down_blocks.2.attentions.0",
    "input_8": "down_blocks.2.attentions.1",
    "middle": "mid_block.attentions.0",
    "output_0": "up_blocks.0.attentions.0",
    "output_1": "up_blocks.0.attentions.1",
    "output_2": "up_blocks.0.attentions.2",
    "output_3": "up_blocks.1.attentions.0",
    "output_4": "up_blocks.1.attentions.1",
    "output_5": "up_blocks.1.attentions.2",
}


@pytest.fixture
def texts() -> dict[str, Any]:
    return {"positive": random_text(1, pooled=64), "negative": random_text(2, pooled=64)}


@pytest.fixture
def demo_tokens(pack: Pack, demo_easyref: Any) -> Any:
    return random_tokens(pack, demo_easyref, seed=3)


def weights_of(pack: Pack, profile: str = "all", **factors: float) -> Any:
    return pack.run("EasyRefLayerWeights", profile, **(dict.fromkeys(GROUPS, 1.0) | factors))


def group_of(record: LayerRecord) -> str:
    return next(g for g, module in MODULES.items() if record.layer.startswith(module + "."))


def test_the_node_multiplies_the_profile_and_shows_the_result(pack: Pack) -> None:
    output = pack.nodes["EasyRefLayerWeights"].execute(
        "style and composition", **(dict.fromkeys(GROUPS, 1.0) | {"input_8": 0.5, "output_3": 2.0})
    )
    weights, text = output.result
    expected = {"input_8": 0.5, "output_1": 1.0}
    assert [weights.of(group) for group in GROUPS] == [expected.get(g, 0.0) for g in GROUPS]
    assert text.splitlines() == [f"{g}: {expected.get(g, 0):g}" for g in GROUPS]
    assert output.ui == {"text": (text,)}


def test_all_at_one_is_as_without(
    pack: Pack, demo: Any, demo_easyref: Any, demo_tokens: Any, texts: dict[str, Any]
) -> None:
    plain = apply(pack, demo.model, demo_easyref, demo_tokens)
    ones = apply(pack, demo.model, demo_easyref, demo_tokens, layer_weights=weights_of(pack))
    assert torch.equal(predict(ones, CFG, **texts), predict(plain, CFG, **texts))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_at_zero_gets_nothing_and_the_others_are_unchanged(
    pack: Pack,
    demo: Any,
    demo_easyref: Any,
    demo_tokens: Any,
    texts: dict[str, Any],
    group: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = pack.part("nodes.sampling.layer")
    taken, slot = [], module.ReferenceAttention
    monkeypatch.setattr(
        module, "ReferenceAttention", lambda *args: taken.append(args[1]) or slot(*args)
    )
    weights = weights_of(pack, **{group: 0.0})
    spy = Spy(pack, demo_easyref, demo.model)
    model = apply(pack, demo.model, demo_easyref, demo_tokens, layer_weights=weights)
    predict(spy.watch(model), positive=texts["positive"])
    assert taken
    assert not any(layer.startswith(MODULES[group] + ".") for layer in taken)
    own = [record for record in spy.records if group_of(record) == group]
    assert own
    assert all(torch.equal(record.out, spy.to_out(record, record.text)) for record in own)
    truth = [(texts["positive"][0][0], demo_tokens.cond)]
    assert spy.max_error(truth, lambda record: float(group_of(record) != group)) < EXACT


def test_weights_multiply_in_each_group_with_mask_and_weight(
    pack: Pack, demo: Any, demo_easyref: Any, demo_tokens: Any, texts: dict[str, Any]
) -> None:
    values = {group: number / 5 - 1 for number, group in enumerate(GROUPS)}
    spy = Spy(pack, demo_easyref, demo.model)
    mask = torch.full((1, 8, 8), 0.5)
    model = apply(
        pack,
        demo.model,
        demo_easyref,
        demo_tokens,
        layer_weights=weights_of(pack, **values),
        mask=mask,
        weight=1.5,
    )
    predict(spy.watch(model), CFG, latents(2), **texts)
    truth = [
        (texts["positive"][0][0], demo_tokens.cond),
        (texts["negative"][0][0], demo_tokens.uncond),
    ]
    assert spy.max_error(truth, lambda record: 0.75 * values[group_of(record)]) < EXACT


def test_two_profiles_on_two_apply_nodes_add_up(
    pack: Pack, demo: Any, demo_easyref: Any, demo_tokens: Any, texts: dict[str, Any]
) -> None:
    model = demo.model
    for name in ("style", "composition"):
        weights = weights_of(pack, name)
        model = apply(pack, model, demo_easyref, demo_tokens, layer_weights=weights)
    both = weights_of(pack, "style and composition")
    once = apply(pack, demo.model, demo_easyref, demo_tokens, layer_weights=both)
    assert difference(predict(model, CFG, **texts), predict(once, CFG, **texts)) < 5e-5


def test_weights_for_layers_that_the_model_lacks_are_refused(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    layers = pack.part("nodes.host.unet_layers")
    present = {layers.group_of(x.block) for x in layers.cross_attention_layers(unet).values()}
    lacking = next(group for group in GROUPS if group not in present)
    weights = weights_of(pack, **{lacking: 0.5})
    with pack.refused(lacking, "has no such layers", *sorted(present)):
        apply(pack, unet, easyref, tokens, layer_weights=weights)
    region = pack.run("EasyRefRegion", tokens, torch.ones(1, 8, 8), 1.0, layer_weights=weights)
    with pack.refused(lacking, "has no such layers"):
        apply(pack, unet, easyref, None, regions=region)
    own = next(group for group in GROUPS if group in present)
    apply(pack, unet, easyref, tokens, layer_weights=weights_of(pack, **{own: 0.5}))
