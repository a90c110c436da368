"""What a group needs is known, and what cannot be encoded refused, before any weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from PIL import Image

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import GroupPlan, Reference, plan_group
from easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.untrusted import shown

FOUR = "four_refs_prompt"


@pytest.fixture
def plan(checkpoint: AdapterCheckpoint) -> EncoderPlan:
    return plan_encoder(checkpoint, goldens.MLLM)


@pytest.mark.parametrize("aggregation", ["easyref", "average", "concatenate"])
def test_a_plan_knows_passes_positions_and_steps_before_weights_are_read(
    plan: EncoderPlan, tokenizer: PromptTokenizer, aggregation: str
) -> None:
    group = goldens.references(FOUR)
    found = plan_group(plan, tokenizer, group, "a boat", aggregation=aggregation, image_size=84)
    counts = [len(mllm_pass.images) for mllm_pass in found.passes]
    assert counts == ([4] if aggregation == "easyref" else [1] * 4)
    for mllm_pass in (*found.passes, found.unconditional):
        for image, (first, end) in zip(mllm_pass.images, mllm_pass.chat.image_spans, strict=True):
            assert end - first == image.num_tokens == image.patches().num_tokens
    assert found.steps == 4 + 1 + (len(counts) + 1) * plan.config.num_layers
    assert found.insert_before == plan.checkpoint.final_layers


def test_many_negatives_need_the_most_memory(plan: EncoderPlan, tokenizer: PromptTokenizer) -> None:
    group = goldens.references(FOUR)

    def needed(**settings: Any) -> int:
        return plan_group(plan, tokenizer, group, "", **settings).working_bytes(torch.float32, True)

    assert needed(negatives=group * 3) > needed()


def test_cache_keys_tell_pixels_sizes_and_settings_apart(
    plan: EncoderPlan, tokenizer: PromptTokenizer
) -> None:
    def planned(colour: str = "red", **settings: Any) -> GroupPlan:
        group = [Reference(Image.new("RGB", (60, 90), colour))]
        given = {"image_size": 84, "negatives": group} | settings
        return plan_group(plan, tokenizer, group, "a boat", **given)

    plain, others = planned(), [planned("blue"), planned(image_size=112)]
    assert planned().passes[0].images[0].key == plain.passes[0].images[0].key
    assert plain.passes[0].images[0].key not in {o.passes[0].images[0].key for o in others}
    others.append(planned(insert_before=2))
    keys = [plan.tokens_key(plan.unconditional) for plan in (planned(), plain, *others)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("size", [5069, 10**9])
def test_an_image_size_beyond_the_context_is_refused(
    plan: EncoderPlan, tokenizer: PromptTokenizer, size: int
) -> None:
    assert plan.config.max_positions == 32768
    with goldens.refused(f"image_size is {size}", "32,768", "at most 5068", "or 0", "(336)"):
        plan_group(plan, tokenizer, goldens.references(FOUR), "", image_size=size)


def test_an_adapter_trained_at_such_a_size_is_refused(
    tmp_path: Path, tokenizer: PromptTokenizer
) -> None:
    path = goldens.write(tmp_path / "a.safetensors", goldens.adapter_tensors(), image_size="99999")
    plan = plan_encoder(load_checkpoint(path), goldens.MLLM)
    with goldens.refused("image_size is 99999", "at most 5068"):
        plan_group(plan, tokenizer, goldens.references(FOUR), "")


@pytest.mark.parametrize("aggregation", ["average", "concatenate"])
def test_a_baseline_with_all_weights_zero_is_refused_before_encoding(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    aggregation: str,
) -> None:
    monkeypatch.setattr(EasyRefEncoder, "encode_images", lambda *_: pytest.fail("encoded"))
    nothing = [replace(r, weight=0.0) for r in goldens.references(FOUR)]
    with goldens.refused("weight 0", aggregation):
        goldens.encode(encoder, tokenizer, nothing, "", aggregation=aggregation)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "CMYK", "P"])
def test_a_picture_of_another_mode_is_made_rgb(mode: str) -> None:
    assert Reference(Image.new(mode, (9, 8))).picture.mode == "RGB"


def test_a_reference_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    for value in (None, "picture.png", torch.rand(8, 8, 3)):
        with goldens.refused("cat is", shown(value), "a picture is needed"):
            Reference(value, name="cat")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with goldens.refused("cut.png", "damaged or truncated"):
        Reference(Image.open(tmp_path / "cut.png"), name="cut.png")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": None}, "prompt is nothing; it must be a text"),
        ({"prompt": ["a", "b"]}, "prompt is a list"),
        ({"prompt": 5}, "prompt is 5"),
        ({"aggregation": ["easyref"]}, "aggregation a list"),
        ({"aggregation": None}, "aggregation nothing"),
        ({"image_size": "84"}, "image_size is '84'"),
        ({"image_size": float("nan")}, "image_size is nan"),
        ({"image_size": 84.5}, "image_size is 84.5"),
        ({"image_size": True}, "image_size is true"),
        ({"insert_before": 1.5}, "insert_before is 1.5"),
        ({"insert_before": "1"}, "insert_before is '1'"),
        ({"references": None}, "references is nothing"),
        ({"references": [Image.new("RGB", (64, 64))]}, "Reference 1 is a Image"),
        ({"negatives": ["cat.png"]}, "negative references: Reference 1 is 'cat.png'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_other_types_are_refused(
    plan: EncoderPlan, tokenizer: PromptTokenizer, settings: dict[str, Any], said: str
) -> None:
    given = {"references": goldens.references(FOUR), "prompt": "a boat", "image_size": 84}
    with goldens.refused(said):
        plan_group(plan, tokenizer, **(given | settings))


def test_numbers_of_other_kinds_are_numbers(plan: EncoderPlan, tokenizer: PromptTokenizer) -> None:
    (picture,) = goldens.pictures("one_ref_prompt")
    for weight in (2, np.float32(2), torch.tensor(2.0), np.int64(2)):
        assert Reference(picture, weight).weight == 2.0
        assert type(Reference(picture, weight).weight) is float
    for size in (84, 84.0, np.int64(84), torch.tensor(84)):
        found = plan_group(plan, tokenizer, [Reference(picture)], "", image_size=size)
        assert found.passes[0].images[0].image_size == 84
