"""Pictures to avoid stand where the official code reads a black picture, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import goldens
import pytest
import torch
from PIL import Image
from test_weights_and_insertion import FOUR

from easyref_core.encode.cache import EncodingCache
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import BASELINES, Reference
from easyref_core.pictures.preprocessing import black_picture
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.tokens.reference_tokens import ReferenceTokens

RED = Reference(Image.new("RGB", (90, 60), "red"), name="red")
BLUE = Reference(Image.new("RGB", (60, 90), "blue"), name="blue")


@pytest.fixture
def encode(encoder: EasyRefEncoder, tokenizer: PromptTokenizer) -> Callable[..., ReferenceTokens]:
    """The golden case of four references; other references and prompts can be given."""

    def run(references: Any = None, prompt: str | None = None, **options: Any) -> ReferenceTokens:
        return goldens.encode(
            encoder,
            tokenizer,
            references or goldens.references(FOUR),
            goldens.user_prompt(FOUR) if prompt is None else prompt,
            **({"image_size": goldens.IMAGE_SIZE} | options),
        )

    return run


@pytest.mark.parametrize("aggregation", ["easyref", *BASELINES])
def test_the_default_negative_is_the_official_black_picture(
    encode: Callable[..., ReferenceTokens], aggregation: str
) -> None:
    found = encode(aggregation=aggregation)
    golden = goldens.expected()["full.uncond_black.tokens"]
    copies = found.num_tokens // golden.shape[1]
    assert goldens.difference(found.uncond, golden.repeat(1, copies, 1)) < 1e-4
    black = encode(aggregation=aggregation, negatives=[Reference(black_picture())])
    assert torch.equal(found.uncond, black.uncond)


def test_negatives_are_encoded_together_without_the_prompt(
    encode: Callable[..., ReferenceTokens],
) -> None:
    found = encode(negatives=[RED, BLUE])
    assert torch.equal(found.uncond, encode([RED, BLUE], "").cond)
    assert torch.equal(found.cond, encode().cond), "the references are read as without them"
    assert found.num_references == 4
    assert not torch.equal(found.uncond, encode(negatives=[BLUE, RED]).uncond)


@pytest.mark.parametrize("aggregation", ["easyref", *BASELINES])
def test_every_aggregation_accepts_negatives(
    encode: Callable[..., ReferenceTokens], aggregation: str
) -> None:
    found = encode(aggregation=aggregation, negatives=[RED, BLUE])
    wanted = encode([RED, BLUE], "").cond
    copies = found.num_tokens // wanted.shape[1]
    assert torch.equal(found.uncond, wanted.repeat(1, copies, 1))


def test_weights_of_negatives_count(encode: Callable[..., ReferenceTokens]) -> None:
    heavy = [RED, replace(BLUE, weight=3.0)]
    found = encode(negatives=heavy)
    assert torch.equal(found.uncond, encode(heavy, "").cond)
    assert not torch.equal(found.uncond, encode(negatives=[RED, BLUE]).uncond)


def test_the_cache_tells_negatives_apart(encode: Callable[..., ReferenceTokens]) -> None:
    cache = EncodingCache()
    heavy = replace(BLUE, weight=3.0)
    for negatives in ((), [RED], [BLUE], [heavy], [RED, BLUE], [BLUE, RED], (), [RED]):
        found = encode(negatives=negatives, cache=cache)
        assert torch.equal(found.uncond, encode(negatives=negatives).uncond)


def test_negatives_are_not_encoded_again_for_another_prompt(
    encode: Callable[..., ReferenceTokens],
    encoder: EasyRefEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = EncodingCache()
    encode(negatives=[RED, BLUE], cache=cache)
    passes: list[int] = []
    states = type(encoder).reference_states

    def counted(self: EasyRefEncoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        passes.append(1)
        return states(self, *args, **kwargs)

    monkeypatch.setattr(type(encoder), "reference_states", counted)
    encode(prompt="something else", negatives=[RED, BLUE], cache=cache)
    assert len(passes) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_progress_counts_negatives(encode: Callable[..., ReferenceTokens], cached: bool) -> None:
    cache = EncodingCache()
    if cached:
        encode(negatives=[RED, BLUE], cache=cache)
    steps: list[tuple[int, int]] = []
    encode(negatives=[RED, BLUE], cache=cache, progress=lambda *step: steps.append(step))
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert {total for _, total in steps} == {steps[-1][0]} == {4 + 2 + 2 * 4}


def test_unusable_negatives_are_named(encode: Callable[..., ReferenceTokens]) -> None:
    with goldens.refused("negative references: thin", "aspect ratio of 400"):
        encode(negatives=[RED, Reference(Image.new("RGB", (2000, 5)), name="thin")])
    with goldens.refused("negative references", "200 references", "32,768"):
        encode(negatives=[BLUE] * 200, image_size=448)
