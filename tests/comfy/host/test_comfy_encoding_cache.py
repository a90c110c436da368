"""What encoders keep of earlier groups, in ComfyUI."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyhost import ADAPTER_ONLY, CASE, GOLDEN, GOLDEN_MLLM, Pack, golden, off_golden
from goldens import IMAGE_SIZE, difference, user_prompt
from PIL import Image

TOKENS = 1e-4


@pytest.mark.keeps
def test_what_was_encoded_before_needs_no_weights(
    fresh_easyref: Any, encode: Callable[..., Any]
) -> None:
    """As in EasyRef Quick, when only its weight changes: keys and values are kept as well."""
    import comfy.model_management as mm

    first = encode()
    mm.unload_all_models()
    assert encode() is first
    other = encode(prompt="something else")
    again = encode()
    assert again is first
    del first, again
    mm.unload_all_models()
    gc.collect()
    assert off_golden(encode()) < TOKENS  # another value, of the tokens that are kept
    assert mm.current_loaded_models == []
    assert encode(prompt="something else") is other


@pytest.mark.keeps
def test_the_black_picture_is_encoded_once_for_all_loaders(
    pack: Pack, fresh_easyref: Any, encode: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode()
    passes = pack.part("easyref_core.encode.passes")
    seen, begin = [], passes.EncodingCache.begin
    monkeypatch.setattr(
        passes.EncodingCache,
        "begin",
        lambda *given: seen.append(given[-1]) or begin(*given),
    )
    second = pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")
    found = encode(second, prompt=user_prompt(CASE) + ".")
    assert [len(mllm_pass.images) for mllm_pass in seen] == [4]
    assert difference(found.uncond, golden("full.uncond_black.tokens")) < TOKENS
    encode(pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "bf16"))
    assert [len(mllm_pass.images) for mllm_pass in seen] == [4, 4, 1]


def test_many_prompts_keep_the_newest_tokens_and_no_more_memory(
    pack: Pack,
    unet: Any,
    encode: Callable[..., Any],
    random_pictures: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two adapters take turns, prompts and references change; outputs are dropped, as ComfyUI does
    with those of older prompts."""
    monkeypatch.setenv("EASYREF_CACHE_MB", "2")
    loaders = [
        pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto") for name in (GOLDEN, ADAPTER_ONLY)
    ]
    kept: list[int] = []
    for number in range(24):
        easyref = loaders[number % 2]
        tokens = encode(
            easyref, prompt=f"prompt {number}", references=random_pictures(number % 4, count=2)
        )
        easyref.key_values.get(tokens, torch.device("cpu"), torch.float32)
        del tokens
        for one in loaders:
            assert len(one.encoder._made) <= 1
            assert len(one.key_values._cached) <= 1
        cache = easyref.encoder._cache
        kept.append(cache._pictures.nbytes + cache._prompts.nbytes + cache.image_features.nbytes)
    assert max(kept[12:]) <= 1.05 * max(kept[8:12])


@pytest.fixture
def random_pictures(pack: Pack) -> Callable[..., Any]:
    """Pictures of a seed."""
    reference = pack.part("easyref_core.encode.group").Reference

    def make(seed: int, count: int) -> Any:
        colours = [(seed * 50, n * 80, 7) for n in range(count)]
        return tuple(reference(Image.new("RGB", (60, 60), colour)) for colour in colours)

    return make


@pytest.mark.keeps
def test_what_is_kept_goes_with_the_loaders_value(pack: Pack, encode: Callable[..., Any]) -> None:
    easyref = pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")
    encode(easyref)
    cache = easyref.encoder._cache
    kept = weakref.ref(next(iter(cache._pictures._items.values())))
    del easyref, cache
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(("setting", "kept"), [("0", 0), ("1", 2**20), ("", None), (" 64 ", 2**26)])
def test_how_much_is_kept_can_be_set(
    pack: Pack,
    encode: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    kept: int | None,
) -> None:
    monkeypatch.setenv("EASYREF_CACHE_MB", setting)
    easyref = pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")
    encode(easyref)
    pictures = easyref.encoder._cache._pictures
    assert (pictures.nbytes > 0) == (kept != 0)
    assert kept is None or pictures.budget == kept
    assert (easyref.encoder.kept_bytes > 0) == (kept != 0)


@pytest.mark.parametrize("setting", ["-1", "1.5", "a lot", "²"])
def test_a_setting_that_is_no_number_is_refused(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("EASYREF_CACHE_MB", setting)
    with pack.refused("EASYREF_CACHE_MB", repr(setting), "whole number of megabytes"):
        pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, "auto")


@pytest.mark.keeps
def test_a_changed_prompt_does_not_encode_the_pictures_again(
    fresh_easyref: Any, encode: Callable[..., Any]
) -> None:
    encode(prompt="something else")
    looks: list[Any] = []
    visual = fresh_easyref.encoder.patcher.model.multimodal_llm.visual
    handle = visual.register_forward_hook(lambda *args: looks.append(args))
    tokens = encode()
    assert not looks
    encode(image_size=2 * IMAGE_SIZE)
    assert looks
    handle.remove()
    assert off_golden(tokens) < TOKENS
