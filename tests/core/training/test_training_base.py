"""Base models that are damaged, hostile or do not fit together are refused before training."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyref_core.errors import EasyRefError
from easyref_core.training import base as base_module
from easyref_core.training.base import load_base


@pytest.fixture
def base(training_set: Any, tmp_path: Path) -> Path:
    return shutil.copytree(training_set.base, tmp_path / "base")


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, said: str) -> None:
    with pytest.raises(EasyRefError, match=said) as raised:
        load_base(folder)
    assert str(raised.value).isprintable()


TRANSFORMERS = "transformer_layers_per_block"
CONFIGS = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.parametrize("file", CONFIGS)
def test_configurations_are_needed_and_read_before_any_library_opens_them(
    base: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "load_part", lambda *_: pytest.fail("loaded a model"))
    path = base / file
    for content, said in (
        (b"[" * 100_000, "nested more than"),
        (b"[]", "holds no object of keys"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
    ):
        path.write_bytes(content)
        refused(base, said)
    os.truncate(path, 20_000_000_000)
    refused(base, "has 20,000,000,000 bytes")
    path.unlink()
    refused(base, f"lacks {path.name}")
    if os.name == "posix":
        os.mkfifo(path)
        refused(base, "pipe or a device")
    shutil.rmtree(path.parent)
    refused(base, f"lacks {path.parent.name}")


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("unet/config.json", {"transformer_layers_per_block": [1, 10**9]}, "transformer_layers"),
        ("unet/config.json", {"layers_per_block": 90, TRANSFORMERS: 90}, "layers_per_block as 90"),
        ("vae/config.json", {"num_encoder_blocks": [10**9]}, "num_encoder_blocks"),
        ("text_encoder/config.json", {"hidden_size": 10**12}, "hidden_size"),
        ("unet/config.json", {"norm_eps": float("nan")}, "norm_eps"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("vae/config.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("vae/config.json", {"_class_name": ["own", "Own"]}, "is of class a list"),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["../x"]}, "further files"),
    ],
)
def test_odd_configurations_are_refused_before_anything_is_built(
    base: Path, file: str, changes: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "load_part", lambda *_: pytest.fail("loaded a model"))
    edit(base, file, **changes)
    refused(base, said)


def test_weights_outside_the_folder_are_refused(base: Path) -> None:
    for name in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", 3, ""):
        index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        refused(base, "lies outside|a file name is needed")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("text_encoder/config.json", {"num_hidden_layers": 2}),
        ("text_encoder/config.json", {"num_hidden_layers": 4}),
        ("text_encoder_2/config.json", {"hidden_size": 32}),
        ("text_encoder/config.json", {"hidden_size": "wide"}),
        ("text_encoder/config.json", {"num_hidden_layers": None}),
        ("unet/config.json", {"layers_per_block": 1}),
        ("unet/config.json", {"layers_per_block": "many"}),
        ("unet/config.json", {"transformer_layers_per_block": [1, 1, 1]}),
        ("vae/config.json", {"num_encoder_blocks": [1, 3, 3, 2]}),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "all"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 78}),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(
    base: Path, file: str, changes: dict
) -> None:
    edit(base, file, **changes)
    refused(base, "model.base")


def without(name: str) -> Callable[[dict], dict]:
    return lambda weights: {key: weight for key, weight in weights.items() if name not in key}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_encoder", without("layers.1.mlp.fc1.bias")),
        ("text_encoder", lambda w: w | {"text_model.encoder.scale_weight": torch.ones(1)}),
        ("unet", without("conv_in.bias")),
        ("unet", lambda w: w | {"conv_in.scale_weight": torch.ones(1)}),
        ("vae", without("encoder.layers.0.bias")),
    ],
)
def test_weights_that_lack_something_or_have_more_are_refused(
    base: Path, part: str, change: Callable[[dict], dict]
) -> None:
    (path,) = (base / part).glob("*.safetensors")
    weights = load_file(path)
    changed = change(weights)
    assert changed.keys() != weights.keys()
    save_file(changed, path, {"format": "pt"})
    refused(base, "model.base")


def test_parts_of_different_models_are_refused(base: Path) -> None:
    shutil.rmtree(base / "text_encoder")
    shutil.copytree(base / "text_encoder_2", base / "text_encoder")
    refused(base, "text encoders' widths together are .*, the UNet's cross_attention_dim is 96")


def test_damaged_weights_are_refused(base: Path) -> None:
    (path,) = (base / "text_encoder").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    refused(base, "text_encoder|cannot be loaded")
