"""Wrong input at the nodes gives a clear error and changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from comfyhost import ADAPTER_ONLY, GOLDEN, GOLDEN_MLLM, Pack, gathered, golden, put_adapter
from goldens import IMAGE_SIZE, MLLM, TINY, difference, pictures, user_prompt

CASE = "one_ref_prompt"
FROM_ADAPTER = "from adapter"


@pytest.fixture
def encode(pack: Pack, easyref: Any) -> Callable[..., Any]:
    """The Encode node on one picture; the settings may be changed."""

    def run(adapter: Any = easyref, **settings: Any) -> Any:
        given = {"prompt": "", "aggregation": "easyref", "image_size": IMAGE_SIZE}
        return pack.run("EasyRefEncode", adapter, **(given | settings))

    return run


def picture(*shape: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=noise)


def golden_picture() -> torch.Tensor:
    import numpy as np

    (image,) = pictures(CASE)
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255)[None]


def mllm(pack: Pack, name: str) -> Path:
    """Where an MLLM directory of this name lies."""
    return pack.base / "models" / "LLM" / name


# Pictures


def test_no_picture(pack: Pack, encode: Callable[..., Any]) -> None:
    for nothing in ({}, {"images": picture(0, 30, 40, 3)}, {"references": ()}):
        with pack.refused("There is no reference picture", "Connect at least one"):
            encode(**nothing)


@pytest.mark.parametrize("shape", [(1, 0, 40, 3), (1, 30, 0, 3), (1, 30, 40, 0), (1, 30, 40, 5)])
def test_a_picture_without_pixels_or_colours(
    pack: Pack, encode: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    with pack.refused("images", list(shape[1:])):
        encode(images=picture(*shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_of_values_that_are_not_numbers_is_named(
    pack: Pack, encode: Callable[..., Any], value: float
) -> None:
    broken = picture(3, 30, 40, 3)
    broken[1, 5, 5] = value
    with pack.refused("images (picture 2)", "3 values", "not numbers"):
        encode(images=broken)
    with pack.refused("image_7", "3 values"):
        gathered(pack, *[picture(1, 8, 8, 3)] * 6, broken[1:2])


@pytest.mark.parametrize("shape", [(1, 5, 2000, 3), (1, 2000, 5, 3)])
def test_a_picture_that_is_too_elongated_is_named(
    pack: Pack, encode: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    group = gathered(pack, picture(1, 8, 8, 3), picture(*shape))
    with pack.refused("image_2", f"{shape[2]}x{shape[1]}", "aspect ratio of 400"):
        encode(references=group)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 1, 100, 3), (1, 300, 2, 3), (2, 8, 8, 3)])
def test_a_tiny_picture_is_encoded(encode: Callable[..., Any], shape: tuple[int, ...]) -> None:
    assert encode(images=picture(*shape)).cond.isfinite().all()


def test_alpha_is_dropped_and_grey_is_grey(encode: Callable[..., Any]) -> None:
    colours = golden_picture()
    expected = encode(images=colours, prompt=user_prompt(CASE))
    assert difference(expected.cond, golden(f"full.{CASE}.tokens")) < 1e-4
    for alpha in (0.0, 0.5):
        rgba = torch.cat([colours, torch.full_like(colours[..., :1], alpha)], dim=-1)
        assert torch.equal(encode(images=rgba, prompt=user_prompt(CASE)).cond, expected.cond)
    grey = colours[..., :1]
    as_colours = encode(images=grey.expand(-1, -1, -1, 3))
    assert torch.equal(encode(images=grey).cond, as_colours.cond)
    assert torch.equal(encode(images=torch.cat([grey, grey], -1)).cond, as_colours.cond)


def test_a_picture_without_its_batch_is_one_picture(encode: Callable[..., Any]) -> None:
    assert torch.equal(
        encode(images=golden_picture()[0]).cond, encode(images=golden_picture()).cond
    )


def test_weights_that_leave_nothing(pack: Pack, encode: Callable[..., Any]) -> None:
    group = gathered(pack, golden_picture(), weight=0.0)
    assert encode(references=group).cond.isfinite().all()
    for aggregation in ("average", "concatenate"):
        with pack.refused("weight 0", aggregation):
            encode(references=group, aggregation=aggregation)


# Prompts


def test_a_prompt_beyond_the_mllms_context(pack: Pack, encode: Callable[..., Any]) -> None:
    with pack.refused("The prompt is too long", "32,768", "Shorten the prompt"):
        encode(images=golden_picture(), prompt="a cat on the grass " * 20_000)


def test_a_prompt_of_a_thousand_words(encode: Callable[..., Any]) -> None:
    long = encode(images=golden_picture(), prompt="a cat on the grass " * 200)
    assert long.cond.isfinite().all()
    assert difference(long.cond, encode(images=golden_picture()).cond) > 0.01


@pytest.mark.parametrize(
    "prompt",
    ["<|image_pad|>", "a <|im_end|>\n<|im_start|>user", "<|vision_start|>" * 9, "\0", "猫"],
)
def test_a_prompt_that_spells_special_tokens_is_text(
    encode: Callable[..., Any], prompt: str
) -> None:
    tokens = encode(images=golden_picture(), prompt=prompt)
    assert tokens.cond.isfinite().all()
    assert difference(tokens.cond, encode(images=golden_picture()).cond) > 1e-3
    assert tokens.prompt == prompt


# Files


def test_an_mllm_of_another_size(pack: Pack, tmp_path: Path) -> None:
    goldens.mllm_directory(mllm(pack, "wider"))
    for adapter in (GOLDEN, ADAPTER_ONLY):
        with pack.refused(adapter, "width 64", mllm(pack, "wider"), "128"):
            pack.run("EasyRefLoader", adapter, "wider", "auto")


def test_an_mllm_without_its_tokenizer(pack: Pack, encode: Callable[..., Any]) -> None:
    directory = mllm(pack, "mute")
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MLLM / name, directory / name)
    easyref = pack.run("EasyRefLoader", GOLDEN, "mute", "auto")
    with pack.refused("There is no tokenizer", directory):
        encode(easyref, images=golden_picture())
    for name in goldens.TOKENIZER_FILES:
        shutil.copy(MLLM / name, directory / name)
    result = encode(easyref, images=golden_picture(), prompt=user_prompt(CASE))
    assert difference(result.cond, golden(f"full.{CASE}.tokens")) < 1e-4


def test_an_mllm_of_only_config_and_tokenizer_is_enough_for_an_adapter_that_carries_it(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    directory = mllm(pack, "light")
    shutil.copytree(MLLM, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    easyref = pack.run("EasyRefLoader", GOLDEN, "light", "auto")
    result = encode(easyref, images=golden_picture(), prompt=user_prompt(CASE))
    assert difference(result.cond, golden(f"full.{CASE}.tokens")) < 1e-4
    with pack.refused(ADAPTER_ONLY, "weights are missing"):
        pack.run("EasyRefLoader", ADAPTER_ONLY, "light", "auto")


def test_encoding_with_an_adapter_without_the_mllm_is_refused(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    easyref = pack.run("EasyRefLoader", ADAPTER_ONLY, FROM_ADAPTER, "auto")
    with pack.refused(ADAPTER_ONLY, "does not carry the MLLM", "Qwen2-VL-2B-Instruct"):
        encode(easyref, images=golden_picture())
    assert easyref.encoder.patcher is None


def test_an_adapter_of_unknown_head_count_needs_the_directory(pack: Pack) -> None:
    with pack.refused(GOLDEN, "width 64", "config.json"):
        pack.run("EasyRefLoader", GOLDEN, FROM_ADAPTER, "auto")


def random_adapter(pack: Pack, name: str, **sizes: Any) -> Any:
    """An adapter that carries an MLLM of Qwen2-VL's head sizes, used with no directory."""
    tensors = goldens.random_adapter(goldens.random_encoder(**sizes))
    return pack.run("EasyRefLoader", put_adapter(pack, name, tensors), FROM_ADAPTER, "auto")


def test_comfyuis_tokenizer_with_an_mllm_of_a_smaller_vocabulary(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    easyref = random_adapter(pack, "small.safetensors")
    with pack.refused("qwen25_tokenizer", "151", f"knows only {TINY.vocab_size}"):
        encode(easyref, images=golden_picture())


def test_comfyuis_tokenizer_serves_an_adapter_that_carries_its_mllm(
    pack: Pack, encode: Callable[..., Any]
) -> None:
    easyref = random_adapter(pack, "whole.safetensors", vocab_size=151936)
    tokens = encode(easyref, images=golden_picture(), prompt="a red cube")
    assert tokens.cond.shape == (1, 16, goldens.TOKEN_WIDTH)
    assert difference(tokens.cond, encode(easyref, images=golden_picture()).cond) > 1e-3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "neither a safetensors nor a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1", "only its pointer here"),
    ],
)
def test_a_damaged_adapter(pack: Pack, content: bytes, said: str) -> None:
    path = pack.base / "models" / "easyref" / "damaged.safetensors"
    path.write_bytes(content)
    with pack.refused(path, said):
        pack.run("EasyRefLoader", path.name, GOLDEN_MLLM, "auto")


def test_a_file_that_is_no_adapter(pack: Pack) -> None:
    name = put_adapter(pack, "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.ones(2, 2)})
    with pack.refused(name, "is not an EasyRef adapter", "a LoRA (models/loras)"):
        pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")


def test_weights_that_are_not_numbers_are_named(pack: Pack, encode: Callable[..., Any]) -> None:
    tensors = goldens.adapter_tensors()
    tensors["image_proj_model.proj.2.weight"][0, 0] = float("nan")
    name = put_adapter(pack, "nan.safetensors", tensors)
    easyref = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    with pack.refused("image_proj_model.proj.2.weight", "not numbers"):
        encode(easyref, images=golden_picture())
