"""Values that come over links are held to the same ranges as typed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from comfyhost import Pack, apply, gathered, predict, text

NAN, INF = float("nan"), float("inf")


def inputs_of(pack: Pack, kind: str) -> list[tuple[str, Any]]:
    """All inputs of a kind, with their node."""
    from comfy_api.latest import io

    wanted = getattr(io, kind).Input
    return [
        (name, declared)
        for name, node in pack.nodes.items()
        for declared in node.define_schema().inputs
        if isinstance(declared, wanted)
    ]


@pytest.fixture
def right(pack: Pack, easyref: Any, tokens: Any, unet: Any, demo: Any) -> dict[str, dict[str, Any]]:
    """Right inputs of every node that has numbers, flags, texts or choices."""
    picture, mask = torch.rand(1, 12, 10, 3), torch.ones(1, 12, 10)
    encode = {"easyref": easyref, "images": picture, "image_size": 84}
    return {
        "EasyRefApply": {"model": unet, "easyref": easyref, "tokens": tokens},
        "EasyRefCombineTokens": {"tokens": {"tokens_1": tokens, "tokens_2": tokens}},
        "EasyRefCrop": {"images": picture},
        "EasyRefEncode": encode,
        "EasyRefIdentity": {"model": unet, "vae": demo.vae, "images": picture},
        "EasyRefInspect": encode,
        "EasyRefLayerWeights": {},
        "EasyRefMllmLayers": {},
        "EasyRefQuick": {k: v for k, v in encode.items() if k != "image_size"} | {"model": unet},
        "EasyRefReferences": {"images": {"image_1": picture}},
        "EasyRefRegion": {"tokens": tokens, "mask": mask},
        "EasyRefSaveTokens": {"tokens": tokens},
        "EasyRefScore": {"images": picture, "reference_images": picture},
        "EasyRefStages": {},
        "EasyRefSetConditioning": {"conditioning": text(), "tokens": tokens},
        "EasyRefWeightCurve": {},
    }


@pytest.fixture
def run(pack: Pack, right: dict[str, dict[str, Any]]) -> Any:
    """A node with its right inputs and widgets as they are at first, save for one."""

    def run(name: str, **changed: Any) -> Any:
        declared = pack.nodes[name].define_schema().inputs
        widgets = {d.id: d.default for d in declared if getattr(d, "default", None) is not None}
        widgets |= {d.id: d.options[0] for d in declared if getattr(d, "options", None)}
        return pack.nodes[name].execute(**(widgets | right[name] | changed))

    return run


@pytest.mark.parametrize("kind", ["Float", "Int"])
def test_every_number_refuses_what_is_none_and_what_is_out_of_its_range(
    pack: Pack, run: Any, kind: str
) -> None:
    tried = 0
    for node, declared in inputs_of(pack, kind):
        beyond = (declared.min - 1, declared.max + 1, np.float32(declared.max + 1), 1e308, 10**400)
        for value in (NAN, -INF, INF, *beyond, "1", True, [1], {}, torch.ones(2), 1j, object()):
            with pack.refused(declared.id, f"from {declared.min:g} to {declared.max:g}"):
                run(node, **{declared.id: value})
            tried += 1
    assert tried >= {"Float": 300, "Int": 20}[kind]


def test_numbers_of_other_kinds_are_numbers(
    pack: Pack, run: Any, unet: Any, easyref: Any, tokens: Any
) -> None:
    expected = predict(apply(pack, unet, easyref, tokens, weight=2.0), 4.0)
    for two in (2, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)):
        assert torch.equal(predict(run("EasyRefApply", weight=two)[0], 4.0), expected)


def test_every_flag_is_true_or_false(pack: Pack, run: Any) -> None:
    flags = inputs_of(pack, "Boolean")
    assert len(flags) == 2
    for node, declared in flags:
        for value in (2, -1, 0.5, 1.0, "false", None, [], torch.ones(1), np.float32(0.5)):
            if value is None and declared.optional:
                continue
            with pack.refused(declared.id, "true or false"):
                run(node, **{declared.id: value})


def test_flags_of_other_packs_are_flags(pack: Pack, run: Any) -> None:
    for square in (True, False):
        expected = run("EasyRefCrop", square=square)[0][0]
        for value in (int(square), np.bool_(square), np.int64(square), torch.tensor(square)):
            assert torch.equal(run("EasyRefCrop", square=value)[0][0], expected)


def test_a_rounding_error_at_a_border_is_no_other_number(
    pack: Pack, run: Any, unet: Any, easyref: Any, tokens: Any
) -> None:
    for node, declared in inputs_of(pack, "Float"):
        for value in (declared.min - 1e-4, declared.max + 1e-4):
            with pack.refused(declared.id, f"from {declared.min:g} to {declared.max:g}"):
                run(node, **{declared.id: value})
    above, below = np.float32(1) + np.finfo(np.float32).eps, 0.3 - 0.1 * 3
    assert above > 1
    assert below < 0
    expected = predict(run("EasyRefApply", start_percent=0.0, end_percent=1.0)[0])
    found = predict(run("EasyRefApply", start_percent=below, end_percent=above)[0])
    assert torch.equal(found, expected)


def test_every_text_is_text(pack: Pack, run: Any) -> None:
    texts = inputs_of(pack, "String")
    assert {declared.id for _, declared in texts} >= {"prompt", "weights", "points", "gallery"}
    for node, declared in texts:
        for value in (5, 0.5, True, ["a", "b"], {"text": "a"}, b"a", torch.ones(1)):
            with pack.refused(declared.id, "it must be a text", "connected"):
                run(node, **{declared.id: value})


def test_every_choice_is_one_of_its_options(pack: Pack, run: Any) -> None:
    choices = [
        (node, declared)
        for node, declared in inputs_of(pack, "Combo")
        if node not in ("EasyRefLoader", "EasyRefLoadTokens", "EasyRefScore")
    ]
    assert len(choices) >= 7
    for node, declared in choices:
        for value in ("gone", "", declared.options[0].upper()):
            with pack.refused(declared.id, repr(value), declared.options[-1]):
                run(node, **{declared.id: value})
        for value in (None, 0, [declared.options[0]]):
            if value is None and declared.optional:
                continue
            with pack.refused(declared.id):
                run(node, **{declared.id: value})


def test_a_link_of_another_kind_is_named_with_what_belongs_there(
    pack: Pack, run: Any, right: dict[str, dict[str, Any]], easyref: Any, tokens: Any
) -> None:
    known = {
        "EASYREF": "EasyRef Loader",
        "EASYREF_TOKENS": "EasyRef Encode",
        "EASYREF_REFERENCES": "EasyRef References",
        "EASYREF_LAYER_WEIGHTS": "EasyRef Layer Weights",
        "EASYREF_MLLM_LAYERS": "EasyRef MLLM Layers",
        "EASYREF_CURVE": "EasyRef Weight Curve",
        "EASYREF_REGIONS": "EasyRef Region",
        "MODEL": "Load Checkpoint",
        "VAE": "Load VAE",
        "CONDITIONING": "CLIP Text Encode",
    }
    tried = set()
    for node in right:
        for declared in pack.nodes[node].define_schema().inputs:
            kind = declared.get_io_type()
            for value in (5, "a", object(), [object()], [[1, 2]], {"a": tokens}, torch.ones(2)):
                if kind in known:
                    with pack.refused(declared.id, known[kind]):
                        run(node, **{declared.id: value})
                    tried.add(kind)
    assert tried == set(known)
    for value in (easyref, "a", [tokens]):
        with pack.refused("tokens_2", "reference tokens"):
            run("EasyRefCombineTokens", tokens={"tokens_1": tokens, "tokens_2": value})


def test_nothing_at_an_optional_input_is_as_if_it_were_not_connected(
    pack: Pack, run: Any, unet: Any, easyref: Any, tokens: Any
) -> None:
    schema = pack.nodes["EasyRefApply"].define_schema()
    nothing = {d.id: None for d in schema.inputs if d.optional} | {"tokens": tokens}
    assert len(nothing) == 6
    found = predict(run("EasyRefApply", **nothing)[0])
    assert torch.equal(found, predict(apply(pack, unet, easyref, tokens)))


def test_nothing_at_a_needed_input_is_named(pack: Pack, run: Any) -> None:
    for name, given in (("EasyRefApply", "weight"), ("EasyRefRegion", "tokens")):
        with pack.refused(given, "is nothing", "connected"):
            run(name, **{given: None})
    with pack.refused("mask is missing", "Connect it"):
        pack.nodes["EasyRefRegion"].execute(tokens=run("EasyRefEncode")[0], weight=1.0)


def test_lists_of_pictures_and_levels_are_pictures(pack: Pack, run: Any) -> None:
    levels = torch.randint(0, 256, (2, 12, 10, 3))
    expected = run("EasyRefEncode", images=levels / 255)[0].cond
    for images in (levels, levels.byte(), list(levels), [levels[:1], levels[1:]], levels.numpy()):
        assert torch.equal(run("EasyRefEncode", images=images)[0].cond, expected)
    group = gathered(pack, levels.byte())
    assert [reference.weight for reference in group] == [1.0, 1.0]


def test_masks_of_levels_and_of_booleans_are_masks(pack: Pack, run: Any) -> None:
    half = torch.zeros(1, 16, 16)
    half[:, :, 8:] = 1
    expected = predict(run("EasyRefApply", mask=half)[0])
    for mask in (half.bool(), (half * 255).byte(), [half[0]], half.half(), half.numpy()):
        assert torch.equal(predict(run("EasyRefApply", mask=mask)[0]), expected)


def test_names_that_are_no_sockets_are_ignored(pack: Pack, run: Any, tokens: Any) -> None:
    both = {"tokens_1": tokens, "tokens_2": tokens}
    expected = run("EasyRefCombineTokens", tokens=both)[0].cond
    found = run("EasyRefCombineTokens", tokens={**both, "\x1f": 0.0, "tokens_0": 5})
    assert torch.equal(found[0].cond, expected)
