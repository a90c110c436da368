"""MLLM directories in every layout that transformers writes; others are refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import Tensors

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.encode.plan_encoder import plan_encoder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The golden MLLM directory without its weights."""
    folder = tmp_path / "mllm"
    shutil.copytree(goldens.MLLM, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return goldens.load_file(goldens.MLLM / "model.safetensors")


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The golden MLLM as transformers' own model."""
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(goldens.MLLM, dtype=torch.float32)


@pytest.fixture
def check(adapter_only: AdapterCheckpoint) -> Callable[[Path], None]:
    """A directory gives the golden encoder."""

    def compare(directory: Path) -> None:
        wanted = plan_encoder(adapter_only, goldens.MLLM)
        found = plan_encoder(adapter_only, directory)
        assert found.identity == wanted.identity
        state = found.build().state_dict()
        assert all(torch.equal(t, state[n]) for n, t in wanted.build().state_dict().items())

    return compare


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["1GB", "300KB"])
def test_what_transformers_writes_is_read(
    theirs: Any, check: Callable, tmp_path: Path, size: str, variant: str | None
) -> None:
    theirs.save_pretrained(tmp_path / "saved", max_shard_size=size, variant=variant)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == (1 if size == "1GB" else 4)
    check(tmp_path / "saved")


def shards(weights: Tensors, names: str) -> Iterator[tuple[str, Tensors]]:
    """Three files of the weights."""
    keys = sorted(weights)
    for number in range(3):
        yield names.format(number + 1), {n: weights[n] for n in keys[number::3]}


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_and_sharded_pickles_are_read(
    check: Callable, directory: Path, weights: Tensors, zipped: bool
) -> None:
    """As transformers 4 writes them with `safe_serialization=False`."""
    kind = {"_use_new_zipfile_serialization": zipped}
    torch.save(weights, directory / "pytorch_model.bin", **kind)
    check(directory)
    (directory / "pytorch_model.bin").unlink()
    places: dict[str, str] = {}
    for file, tensors in shards(weights, "pytorch_model-0000{}-of-00003.bin"):
        torch.save(tensors, directory / file, **kind)
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check(directory)


def test_the_whole_file_comes_first_as_in_transformers(
    check: Callable, directory: Path, weights: Tensors
) -> None:
    goldens.write(directory / "model.safetensors", weights)
    (directory / INDEX).write_text("an index of an older download")
    torch.save({}, directory / "pytorch_model.bin")
    check(directory)


def test_several_variants_are_not_guessed_from(
    adapter_only: AdapterCheckpoint, directory: Path, weights: Tensors
) -> None:
    for variant in ("bf16", "fp16"):
        goldens.write(directory / f"model.{variant}.safetensors", weights)
    with goldens.refused(directory, "model.bf16.safetensors, model.fp16.safetensors", "Keep one"):
        plan_encoder(adapter_only, directory)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "a/../../secret.safetensors",
        "..\\secret.safetensors",
        "linked.safetensors",
        "",
        3,
        None,
        ["model.safetensors"],
        "a\0b",
    ],
    ids=str,
)
def test_an_index_leads_to_no_file_outside_the_directory(
    adapter_only: AdapterCheckpoint, directory: Path, weights: Tensors, file: Any
) -> None:
    secret = goldens.write(directory.parent / "secret.safetensors", weights)
    (directory / "linked.safetensors").symlink_to(secret)
    names = [file, str(secret)] if file == "" else [file]
    for name in names:
        (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
        with goldens.refused(directory):
            plan_encoder(adapter_only, directory)


def test_the_hubs_cache_is_read(check: Callable, tmp_path: Path, weights: Tensors) -> None:
    model = tmp_path / "models--Qwen--Qwen2-VL-2B-Instruct"
    snapshot, blobs = model / "snapshots" / "0123", model / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    files = dict(shards(weights, "model-0000{}-of-00003.safetensors"))
    for number, (file, tensors) in enumerate(files.items()):
        goldens.write(blobs / str(number), tensors)
        (snapshot / file).symlink_to(Path("..", "..", "blobs", str(number)))
    places = {n: file for file, tensors in files.items() for n in tensors}
    (blobs / "index").write_text(json.dumps({"weight_map": places}))
    (snapshot / INDEX).symlink_to(Path("..", "..", "blobs", "index"))
    shutil.copy(goldens.MLLM / "config.json", snapshot)
    check(snapshot)


def test_a_weight_in_two_files_is_not_guessed(
    adapter_only: AdapterCheckpoint, directory: Path, weights: Tensors
) -> None:
    files = [directory / name for name in ("old.safetensors", "new.safetensors")]
    name = sorted(weights)[0]
    goldens.write(files[0], weights)
    goldens.write(files[1], {name: weights[name]})
    places = dict.fromkeys(weights, files[0].name) | {name: files[1].name}
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    with goldens.refused(name, *files):
        plan_encoder(adapter_only, directory)


def test_one_weight_under_two_names_is_not_guessed(
    adapter_only: AdapterCheckpoint, directory: Path, weights: Tensors
) -> None:
    name = "visual.blocks.0.norm1.weight"
    goldens.write(directory / "model.safetensors", weights | {f"model.{name}": weights[name] + 1})
    with goldens.refused(name, f"model.{name}", "two names of one weight"):
        plan_encoder(adapter_only, directory)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "'fp8'"),
        ({"bits": 4}, "an object"),
        ("gptq\x1b", "'gptq\\x1b'"),
        (4, "4"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_weights_are_named_and_not_read(
    adapter_only: AdapterCheckpoint,
    checkpoint: AdapterCheckpoint,
    directory: Path,
    weights: Tensors,
    found: Any,
    said: str,
    nested: bool,
) -> None:
    content = json.loads((directory / "config.json").read_text())
    inner = content.setdefault("text_config", {}) if nested else content
    inner["quantization_config"] = found
    (directory / "config.json").write_text(json.dumps(content))
    name = "model.layers.0.mlp.up_proj.weight"
    state = weights | {name: torch.zeros(8, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(1)}
    goldens.write(directory / "model.safetensors", state)
    with goldens.refused(directory, "quantised", said, "Get Qwen2-VL-2B-Instruct"):
        plan_encoder(adapter_only, directory)
    # An adapter that carries the MLLM needs the directory's numbers and tokenizer only.
    plan_encoder(checkpoint, directory)


def test_shards_without_their_index_are_named(
    adapter_only: AdapterCheckpoint, directory: Path, weights: Tensors
) -> None:
    for file, tensors in shards(weights, "model-0000{}-of-00003.safetensors"):
        goldens.write(directory / file, tensors)
    with goldens.refused(directory, "only model-00001-of-00003.safetensors", "no index of them"):
        plan_encoder(adapter_only, directory)


def test_an_index_of_countless_files_is_refused(
    adapter_only: AdapterCheckpoint, directory: Path
) -> None:
    places = {str(n): f"{n}.safetensors" for n in range(20_000)}
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    with goldens.refused(INDEX, "20,000 weight files"):
        plan_encoder(adapter_only, directory)


def test_names_of_missing_files_are_shown_in_one_line(
    adapter_only: AdapterCheckpoint, directory: Path
) -> None:
    places = {str(n): f"{n}\x1b[2J\n.safetensors" for n in range(900)}
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    with goldens.refused("lacks 900 of its 900", "0\\x1b[2J\\n.safetensors", "897 more"):
        plan_encoder(adapter_only, directory)
