"""MLLM directories that do not fit the adapter, or are damaged, are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import BODY, TINY, Tensors
from tokenizers import Tokenizer, models

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.encode.group import Reference
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.qwen2vl.prompt import PromptTokenizer


def test_mllm_of_another_width(adapter_only: Any, tmp_path: Path) -> None:
    directory = goldens.mllm_directory(tmp_path / "wider")
    with goldens.refused("width 64", "128 wide", directory, "adapter_only.safetensors"):
        plan_encoder(adapter_only, directory)


def test_mllm_of_another_depth(whole: Tensors, plan: Callable, tmp_path: Path) -> None:
    deeper = goldens.mllm_directory(tmp_path / "deeper", replace(TINY, num_layers=6))
    with goldens.refused("weights are missing", f"{BODY}model.layers.3.", deeper):
        plan(whole, deeper)
    taller = replace(TINY, vision=replace(TINY.vision, depth=0))
    with goldens.refused("depth is 0", "whole number from 1"):
        plan(whole, goldens.mllm_directory(tmp_path / "blind", taller))


def test_mllm_of_another_inner_width(whole: Tensors, plan: Callable, tmp_path: Path) -> None:
    other = goldens.mllm_directory(tmp_path / "other", replace(TINY, intermediate_size=64))
    with goldens.refused("[128, 96]", "[128, 64]", "adapter.safetensors", other / "config.json"):
        plan(whole, other)


def test_mllm_whose_heads_cannot_be_told() -> None:
    found = load_checkpoint(goldens.ADAPTER)
    with goldens.refused("easyref.safetensors", "width 64", "heads", "config.json"):
        plan_encoder(found)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the golden MLLM directory that may be damaged."""
    return Path(shutil.copytree(goldens.MLLM, tmp_path / "mllm"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds no settings"),
        ('{"model_type": "qwen2_5_vl"}', "'qwen2_5_vl'"),
        ('{"model_type": "llava"}', "'llava'"),
        ("{}", "type nothing"),
        ('{"model_type": "qwen2_vl"}', "lacks 'hidden_size'"),
    ],
)
def test_unusable_config(
    adapter_only: Any, directory: Path, content: str | None, said: str
) -> None:
    path = directory / "config.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    with goldens.refused(directory, said):
        plan_encoder(adapter_only, directory)


def test_missing_directory(adapter_only: Any, tmp_path: Path) -> None:
    with goldens.refused("There is no MLLM directory", tmp_path / "nowhere"):
        plan_encoder(adapter_only, tmp_path / "nowhere")


def shard(directory: Path) -> dict[str, Path]:
    """Split the directory's weights into two files and an index."""
    tensors = goldens.load_file(directory / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half]}
    parts["model-00002-of-00002.safetensors"] = names[half:]
    for file, held in parts.items():
        goldens.write(directory / file, {n: tensors[n] for n in held})
    index = {"weight_map": {n: file for file, held in parts.items() for n in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    return {file: directory / file for file in parts}


def test_shards_are_read_as_one(adapter_only: Any, directory: Path) -> None:
    whole = plan_encoder(adapter_only, goldens.MLLM).build().state_dict()
    shard(directory)
    state = plan_encoder(adapter_only, directory).build().state_dict()
    assert all(torch.equal(t, state[n]) for n, t in whole.items())


def test_missing_shard(adapter_only: Any, directory: Path) -> None:
    files = shard(directory)
    files["model-00002-of-00002.safetensors"].unlink()
    with goldens.refused("1 of its 2 weight files", "model-00002-of-00002.safetensors"):
        plan_encoder(adapter_only, directory)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', '{"weight_map": {}}']
)
def test_unusable_index(adapter_only: Any, directory: Path, content: str) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(content)
    with goldens.refused("model.safetensors.index.json", "cannot be read"):
        plan_encoder(adapter_only, directory)


def test_weights_that_lack_or_exceed_are_named(adapter_only: Any, directory: Path) -> None:
    tensors = goldens.load_file(directory / "model.safetensors")
    name = "visual.blocks.1.attn.qkv.bias"
    goldens.write(directory / "model.safetensors", goldens.without(tensors, name))
    with goldens.refused("1 weights are missing", BODY + name, directory):
        plan_encoder(adapter_only, directory)
    more = {"visual.blocks.1.attn.gate.weight": torch.zeros(2)}
    goldens.write(directory / "model.safetensors", tensors | more)
    with goldens.refused("1 weights are not part", BODY + next(iter(more)), directory):
        plan_encoder(adapter_only, directory)


def test_directory_without_weights(adapter_only: Any, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with goldens.refused("weights are missing", BODY, directory):
        plan_encoder(adapter_only, directory)


def test_missing_tokenizer(directory: Path) -> None:
    for name in goldens.TOKENIZER_FILES:
        (directory / name).unlink()
    with goldens.refused("no tokenizer", directory, "tokenizer.json"):
        PromptTokenizer.from_directory(directory)


def test_damaged_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    with goldens.refused("tokenizer in", directory, "cannot be read"):
        PromptTokenizer.from_directory(directory)


def test_tokenizer_of_another_family(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with goldens.refused(tmp_path, "lacks <|im_start|>", "<|image_pad|>", "not Qwen2-VL's"):
        PromptTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "merges.txt"])
def test_a_pipe_among_the_tokenizers_files_is_not_waited_for(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with goldens.refused(directory / name, "pipe"):
        PromptTokenizer.from_directory(directory)


def test_a_broken_link_among_the_tokenizers_files_is_nothing(directory: Path) -> None:
    """As the hub's cache leaves them when a file was deleted."""
    (directory / "special_tokens_map.json").unlink()
    (directory / "special_tokens_map.json").symlink_to("nowhere")
    assert PromptTokenizer.from_directory(directory).text_ids("a")


def test_an_endless_tokenizer_is_not_read(directory: Path) -> None:
    with (directory / "vocab.json").open("r+b") as file:
        file.truncate(20 * 10**9)
    with goldens.refused(directory / "vocab.json", "20,000,000,000 bytes"):
        PromptTokenizer.from_directory(directory)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "levels deep"),
        ("[]", "holds no settings"),
        ('{"tokenizer_class": "TransfoXLTokenizer\\u001b"}', "'TransfoXLTokenizer\\x1b'"),
        ('{"tokenizer_class": ["Qwen2Tokenizer"]}', "a list"),
        ('{"fast_tokenizer_files": ["../tokenizer.4.0.json"]}', "further files"),
    ],
)
def test_an_odd_tokenizer_config_is_refused(directory: Path, content: str, said: str) -> None:
    (directory / "tokenizer_config.json").write_text(content)
    with goldens.refused(directory / "tokenizer_config.json", said):
        PromptTokenizer.from_directory(directory)


def test_code_beside_a_tokenizer_is_not_run(directory: Path) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "own.py").write_text("open('ran', 'w')\nclass Tokenizer: pass\n")
    with suppress(EasyRefError):  # it may be read without that code
        PromptTokenizer.from_directory(directory)
    assert not Path("ran").exists()


def test_tokenizer_with_more_tokens_than_the_mllm_knows(tokenizer: PromptTokenizer) -> None:
    reference = Reference(goldens.pictures("one_ref_prompt")[0])
    with goldens.refused("has token 406", "only 300", goldens.MLLM):
        goldens.encode(goldens.random_encoder(vocab_size=300), tokenizer, [reference], "")
