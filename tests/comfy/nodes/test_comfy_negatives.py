"""Negative references: pictures to avoid reach the rows of the negative text, and only those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_spy import Spy
from comfyhost import Pack, apply, gathered, golden, predict, text
from goldens import IMAGE_SIZE, difference, pictures, user_prompt

CASE = "four_refs_prompt"


@pytest.fixture
def group(pack: Pack) -> Any:
    reference = pack.part("easyref_core.encode.group").Reference
    return tuple(reference(p, name=f"image_{n}") for n, p in enumerate(pictures(CASE), start=1))


def encode(pack: Pack, easyref: Any, references: Any, prompt: str = "", **settings: Any) -> Any:
    given = {"aggregation": "easyref", "image_size": IMAGE_SIZE, "references": references}
    return pack.run("EasyRefEncode", easyref, prompt, **(given | settings))


def test_not_connected_it_is_the_official_black_picture(
    pack: Pack, easyref: Any, group: Any
) -> None:
    plain = encode(pack, easyref, group, user_prompt(CASE))
    assert difference(plain.uncond, golden("full.uncond_black.tokens")) < 1e-4
    for nothing in (None, ()):
        result = encode(pack, easyref, group, user_prompt(CASE), negative_references=nothing)
        assert torch.equal(result.uncond, plain.uncond)


def test_they_replace_the_black_picture(pack: Pack, easyref: Any, group: Any) -> None:
    plain = encode(pack, easyref, group[:2], user_prompt(CASE))
    result = encode(pack, easyref, group[:2], user_prompt(CASE), negative_references=group[2:])
    assert torch.equal(result.cond, plain.cond)
    assert torch.equal(result.uncond, encode(pack, easyref, group[2:]).cond)


def test_they_act_on_the_negative_text(
    pack: Pack, spy: Spy, unet: Any, easyref: Any, group: Any
) -> None:
    tokens = encode(pack, easyref, group[:2], "a cat", negative_references=group[2:])
    predict(spy.watch(apply(pack, unet, easyref, tokens)), cfg=5.0)
    truth = [(text()[0][0], tokens.cond), (text("negative")[0][0], tokens.uncond)]
    assert spy.max_error(truth) < 1e-4


def test_a_picture_that_cannot_be_read_is_named_as_one_of_them(
    pack: Pack, easyref: Any, group: Any
) -> None:
    thin = gathered(pack, torch.rand(1, 5, 2000, 3))
    with pack.refused("negative references: image_1", "aspect ratio of 400"):
        encode(pack, easyref, group, negative_references=thin)
