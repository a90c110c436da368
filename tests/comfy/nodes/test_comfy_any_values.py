"""Whatever a link or a graph in API format hands to a node: one sentence, or a finite result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from comfyhost import (
    CLIP_MODEL,
    DINO_MODEL,
    GOLDEN,
    GOLDEN_MLLM,
    Pack,
    gathered,
    predict,
    put_adapter,
    text,
)
from goldens import pooled_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

NODES = [
    "EasyRefApply",
    "EasyRefCombineTokens",
    "EasyRefCrop",
    "EasyRefDemoModels",
    "EasyRefEncode",
    "EasyRefIdentity",
    "EasyRefInspect",
    "EasyRefLayerWeights",
    "EasyRefLoadTokens",
    "EasyRefLoader",
    "EasyRefMllmLayers",
    "EasyRefQuick",
    "EasyRefReferences",
    "EasyRefRegion",
    "EasyRefSaveTokens",
    "EasyRefScore",
    "EasyRefSetConditioning",
    "EasyRefStages",
    "EasyRefWeightCurve",
]
LARGEST_IMAGE_SIZE = 168  # more takes long and is tested elsewhere
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-4, 4),
    st.integers(),
    st.sampled_from([10**400, -(10**400), float("nan"), float("inf"), True, False]),
    st.floats(width=32).map(np.float32),
    st.integers(-9, 9).map(np.int64),
    st.floats(-4, 4).map(torch.tensor),
    st.sampled_from([torch.tensor(float("nan")), torch.tensor(2), torch.tensor(True), 1 + 2j]),
)
texts = st.one_of(
    st.text(st.characters(), max_size=20),  # halves of characters and control characters too
    st.sampled_from(
        ["", "nan", "1, nan", "0:1e999", "a" * 300, "../x", "/", "\0", "0:1, 1:0", "1,"]
    ),
)
shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    """Small, of any shape and kind."""
    shape = draw(shapes)
    kind = draw(st.sampled_from(["float", "half", "int", "byte", "bool", "complex", "nan", "odd"]))
    plain = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    if kind == "odd":
        if draw(st.booleans()):
            return plain.to("meta")
        return plain.to_sparse() if plain.ndim else plain.numpy()
    dtypes = {"half": torch.float16, "bool": torch.bool, "complex": torch.complex64}
    values = {
        "int": (plain * 300).int(),
        "byte": (plain * 255).byte(),
        "nan": plain / 0 - 1 / plain,
    }
    return values.get(kind, plain.to(dtypes.get(kind, torch.float32)))


def anything(good: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """A value of any type, and those that are right elsewhere."""
    simple = st.one_of(
        st.none(),
        numbers,
        texts,
        tensors(),
        st.sampled_from([b"", object(), len, Image.new("RGB", (4, 4)), Ellipsis]),
        st.sampled_from(list(good.values())),
    )
    return st.one_of(
        simple,
        st.lists(simple, max_size=3),
        st.lists(simple, max_size=3).map(tuple),
        st.dictionaries(texts, simple, max_size=2),
        st.lists(st.lists(simple, max_size=3), max_size=2),
        st.tuples(tensors(), st.dictionaries(texts, simple, max_size=2)).map(lambda pair: [pair]),
    )


@pytest.fixture
def good(pack: Pack, tokens: Any, unet: Any, demo: Any) -> dict[str, Any]:
    """A right value of each type of link. The adapter can do every aggregation."""
    name = put_adapter(pack, "every_aggregation.safetensors", pooled_adapter("dla", "lap"))
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    picture, mask = torch.rand(2, 12, 10, 3), torch.rand(1, 12, 10)
    return {
        "EASYREF": easyref,
        "EASYREF_TOKENS": tokens,
        "EASYREF_REFERENCES": gathered(pack, picture),
        "EASYREF_LAYER_WEIGHTS": pack.run("EasyRefLayerWeights", "all"),
        "EASYREF_MLLM_LAYERS": pack.run("EasyRefMllmLayers", "even", "1", "1", 1.0, 1.0),
        "EASYREF_CURVE": pack.run("EasyRefWeightCurve", "linear", 1.0, 0.0, ""),
        "EASYREF_REGIONS": pack.run("EasyRefRegion", tokens, mask, 1.0),
        "MODEL": unet,
        "VAE": demo.vae,
        "IMAGE": picture,
        "MASK": mask,
        "CONDITIONING": text(),
    }


@pytest.fixture
def files(pack: Pack, tokens: Any) -> dict[str, str]:
    """A right choice of each list of files."""
    saved = pack.nodes["EasyRefSaveTokens"].execute(tokens, "any", "output").ui["tokens"][0]
    return {
        "adapter": GOLDEN,
        "mllm": GOLDEN_MLLM,
        "clip_model": CLIP_MODEL,
        "dino_model": DINO_MODEL,
        "file": f"{saved['filename']} [output]",
    }


def widget(declared: Any, files: Mapping[str, str]) -> st.SearchStrategy[Any] | None:
    """What can be typed or chosen; None for a link."""
    from comfy_api.latest import io

    if isinstance(declared, io.Float.Input):
        return st.floats(declared.min, declared.max)
    if isinstance(declared, io.Int.Input):
        return st.integers(declared.min, min(declared.max, LARGEST_IMAGE_SIZE))
    if isinstance(declared, io.Boolean.Input):
        return st.booleans()
    if isinstance(declared, io.Combo.Input):
        return st.sampled_from([files.get(declared.id) or o for o in declared.options])
    if isinstance(declared, io.String.Input):
        return st.just(declared.default or "")
    return None


def value_of(
    declared: Any, good: Mapping[str, Any], files: Mapping[str, str]
) -> st.SearchStrategy[Any]:
    """What an input is given, right or wrong."""
    from comfy_api.latest import io

    if isinstance(declared, io.Autogrow.Input):
        kind = declared.template.input.get_io_type()
        each = mostly(st.just(good[kind]), good)
        names = st.sampled_from(declared.template.names[:3])
        right = st.dictionaries(names, each, min_size=declared.template.min, max_size=3)
    else:
        right = widget(declared, files)
        if right is None:
            right = st.just(good[declared.get_io_type()])
    return mostly(right, good)


@st.composite
def mostly(draw: st.DrawFn, right: st.SearchStrategy[Any], good: Mapping[str, Any]) -> Any:
    """Seven times of eight what is right, so that the others are met alone too."""
    return draw(anything(good) if draw(st.integers(0, 7)) == 7 else right)


def all_inputs(
    node: Any, good: Mapping[str, Any], files: Mapping[str, str]
) -> st.SearchStrategy[dict[str, Any]]:
    declared = node.define_schema().inputs
    needed = {d.id: value_of(d, good, files) for d in declared if not d.optional}
    optional = {d.id: value_of(d, good, files) for d in declared if d.optional}
    return st.fixed_dictionaries(needed, optional=optional)


def as_comfyui_runs(node: Any) -> Callable[..., Any]:
    """The node's function on a locked copy of its class."""
    from comfy_api.internal import make_locked_method_func

    return make_locked_method_func(node, node.FUNCTION, node.PREPARE_CLASS_CLONE(None))


def refusal(pack: Pack, run: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, the sentence of its refusal)."""
    try:
        return run(), None
    except pack.error as error:
        return None, str(error)


def check_sentence(said: str) -> None:
    assert said.endswith((".", ")")), said
    assert "Traceback" not in said
    assert "object at 0x" not in said
    assert said.isprintable() or all(c.isprintable() or c == "\n" for c in said), said
    assert len(said) < 1500


def is_finite(value: Any) -> bool:
    """Of all numbers in a node's output."""
    if isinstance(value, torch.Tensor):
        return value.is_meta or bool(torch.isfinite(value).all())
    if isinstance(value, (float, np.floating)):
        return bool(np.isfinite(value))
    if isinstance(value, (tuple, list)):
        return all(map(is_finite, value))
    if hasattr(value, "__dataclass_fields__"):
        return all(is_finite(getattr(value, name)) for name in value.__dataclass_fields__)
    return True


@pytest.mark.parametrize("name", NODES)
def test_a_node_refuses_in_words_or_gives_what_is_finite(
    pack: Pack, good: dict[str, Any], files: dict[str, str], name: str
) -> None:
    node = pack.nodes[name]

    accepted = []

    @EXAMPLES
    @given(all_inputs(node, good, files))
    def check(inputs: dict[str, Any]) -> None:
        result, said = refusal(pack, partial(as_comfyui_runs(node), **inputs))
        accepted.append(said is None)
        if said is not None:
            check_sentence(said)
        else:
            assert is_finite(result.result)

    check()
    assert True in accepted


def test_every_node_is_tried(pack: Pack) -> None:
    assert sorted(pack.nodes) == NODES


def test_what_apply_accepts_gives_a_finite_picture(pack: Pack, good: dict[str, Any]) -> None:
    node = pack.nodes["EasyRefApply"]

    @settings(EXAMPLES, max_examples=25)
    @given(all_inputs(node, good, {}))
    def check(inputs: dict[str, Any]) -> None:
        model, said = refusal(pack, lambda: node.execute(**inputs)[0])
        if said is None:
            picture, said = refusal(pack, lambda: predict(model, cfg=7.5))
            assert said is not None or torch.isfinite(picture).all()
        if said is not None:
            check_sentence(said)

    check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def typed(declared: Any) -> st.SearchStrategy[Any]:
    """What ComfyUI hands to `validate_inputs`: it makes texts of what is given for a text; None
    for a link."""
    from comfy_api.latest import io

    if isinstance(declared, io.Combo.Input):
        return st.none() | texts | json_values
    return st.none() | texts if isinstance(declared, io.String.Input) else st.none()


@pytest.mark.parametrize(
    "name", ["EasyRefCombineTokens", "EasyRefLoadTokens", "EasyRefLoader", "EasyRefReferences"]
)
def test_the_check_before_a_run_answers_whatever_is_chosen(pack: Pack, name: str) -> None:
    node = pack.nodes[name]
    declared = {each.id: each for each in node.define_schema().inputs}
    names = inspect.signature(node.validate_inputs).parameters

    @EXAMPLES
    @given(st.fixed_dictionaries({each: typed(declared[each]) for each in names}))
    def check(inputs: dict[str, Any]) -> None:
        said = node.validate_inputs(**inputs)
        if said is not True:
            check_sentence(said)

    check()
