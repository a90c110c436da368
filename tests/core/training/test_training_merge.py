"""Adapters with parts trained apart from each other, merged into one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.demo_set import TRAINED_SET
from easyref_core.errors import EasyRefError
from easyref_core.training.merge import merge_adapters
from easyref_core.weight_file import open_weight_file

SHIPPED = TRAINED_SET / "easyref.safetensors"
NEW = ("mllm_layer_pooling.", "_identity_lora.")  # parts that the shipped adapter may have
Write = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def _base(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The shipped adapter as it was trained: in float16, without parts trained later."""
    global BASE
    BASE = tmp_path_factory.mktemp("base") / "easyref.safetensors"
    file = open_weight_file(SHIPPED)
    names = {n: n for n in file.tensors if not any(part in n for part in NEW)}
    weights = {name: weight.half() for name, weight in file.read(names).items()}
    save_file(weights, BASE, {"format": "pt", "image_size": file.metadata["image_size"]})


@pytest.fixture
def variant(tmp_path: Path) -> Write:
    """Writes the base with other weights or metadata."""

    def write(name: str, weights: dict[str, torch.Tensor], **metadata: str) -> Path:
        path = tmp_path / name
        save_file(load_file(BASE) | weights, path, {"image_size": "112", **metadata})
        return path

    return write


def _identity_lora(layers: int, value: float) -> dict[str, torch.Tensor]:
    names = sorted(load_checkpoint(BASE).lora)
    own = [name for name in names if name.endswith("attn1")][:layers]
    width = load_file(BASE)[f"unet.{own[0]}.processor.to_q_lora.up.weight"].shape[0]
    return {
        f"unet.{layer}.processor.{part}_identity_lora.{half}.weight": torch.full(shape, value)
        for layer in own
        for part in ("to_k", "to_v")
        for half, shape in (("down", (2, width)), ("up", (width, 2)))
    }


def test_parts_trained_apart_are_in_one_file(variant: Write, tmp_path: Path) -> None:
    new = _identity_lora(1, 0.5)
    trained, other = variant("a.safetensors", new, note="a"), variant("b.safetensors", {})
    merged = merge_adapters(BASE, [trained, other], tmp_path / "merged.safetensors")
    written, base = load_file(merged), load_file(BASE)
    assert written.keys() == base.keys() | new.keys()
    assert all(torch.equal(written[name], w) for name, w in (base | new).items())
    checkpoint = load_checkpoint(merged)
    assert checkpoint.identity == load_checkpoint(BASE).identity
    assert checkpoint.file.metadata["image_size"] == "112"
    assert checkpoint.file.metadata["note"] == "a"


def test_an_adapter_trained_from_another_is_refused(variant: Write, tmp_path: Path) -> None:
    name = "image_proj_model.proj.3.bias"
    other = variant("other.safetensors", {name: load_file(BASE)[name] + 1})
    with pytest.raises(EasyRefError, match=rf"other\.safetensors was not trained from .*{name}"):
        merge_adapters(BASE, [other], tmp_path / "merged.safetensors")
    larger = variant("larger.safetensors", _identity_lora(1, 0.5))
    with pytest.raises(EasyRefError, match=r"it lacks unet\..*identity_lora"):
        merge_adapters(larger, [BASE], tmp_path / "merged.safetensors")
    assert not (tmp_path / "merged.safetensors").exists()


def test_parts_that_others_were_trained_without_are_refused(variant: Write, tmp_path: Path) -> None:
    weights = load_file(BASE)
    alone = tmp_path / "alone.safetensors"
    without_mllm = {n: w for n, w in weights.items() if not n.startswith("multimodal_llm.model.")}
    assert without_mllm.keys() < weights.keys()
    save_file(without_mllm, alone, {"image_size": "112"})
    with pytest.raises(EasyRefError, match=r"it adds multimodal_llm\.model\."):
        merge_adapters(alone, [variant("whole.safetensors", {})], tmp_path / "merged.safetensors")


def test_two_trainings_of_one_part_are_not_merged(variant: Write, tmp_path: Path) -> None:
    pair = [variant(f"{v}.safetensors", _identity_lora(1, v)) for v in (0.5, 1.5)]
    with pytest.raises(EasyRefError, match="hold different weights of unet"):
        merge_adapters(BASE, pair, tmp_path / "merged.safetensors")


def test_contradictory_metadata_is_refused(variant: Write, tmp_path: Path) -> None:
    other = variant("other.safetensors", {}, image_size="224")
    with pytest.raises(EasyRefError, match="says image_size '224', the adapters before it say"):
        merge_adapters(BASE, [other], tmp_path / "merged.safetensors")


def test_only_an_adapter_is_replaced_and_only_when_asked(variant: Write, tmp_path: Path) -> None:
    trained, to = variant("a.safetensors", {}), variant("to.safetensors", {})
    with pytest.raises(EasyRefError, match=r"exists\. Choose another name"):
        merge_adapters(BASE, [trained], to)
    with pytest.raises(EasyRefError, match="which is read"):
        merge_adapters(BASE, [trained], trained, overwrite=True)
    merge_adapters(BASE, [trained], to, overwrite=True)
