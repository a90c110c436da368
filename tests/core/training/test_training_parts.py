"""The cache of latents, and loading of the models that training starts from."""

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

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.training.base import fingerprint, load_base
from easyref_core.training.batches import TensorCache
from easyref_core.training.build_model import build_model
from easyref_core.training.config import Settings
from easyref_core.training.loop import train

Make = Callable[..., Settings]


def test_caches_of_two_base_models_share_nothing(tmp_path: Path) -> None:
    def value(base: str, number: float) -> float:
        made = TensorCache(tmp_path, base).get("key", lambda: {"x": torch.tensor(number)})
        return float(made["x"])

    assert value("one", 1.0) == 1.0
    assert value("two", 2.0) == 2.0
    assert value("one", 3.0) == 1.0
    assert not list(tmp_path.rglob("*.part"))


def test_images_with_names_that_are_not_unicode_are_cached(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, "base")
    name = os.fsdecode(b"latin-1 \xe9.png")
    made = cache.get(name, lambda: {"x": torch.ones(1)})
    assert cache.get(name, lambda: pytest.fail("computed again"))["x"] == made["x"]


def test_a_replaced_base_model_has_another_fingerprint(tmp_path: Path) -> None:
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.parent.mkdir()
    save_file({"x": torch.zeros(2)}, weights)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    os.utime(weights, ns=(1, 1))
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_an_mllm_that_does_not_fit_its_config_is_refused(
    settings: Make, training_set, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "mllm"
    shutil.copytree(training_set.mllm, folder)
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["visual.merger.ln_q.weight"]
    else:
        weights["visual.merger.ln_x.weight"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    made = settings(model_mllm=str(folder))
    base = load_base(made.model.base)
    with pytest.raises(EasyRefError, match=r"visual\.merger\.ln_[qx]\.weight"):
        build_model(base.unet, made.model, made.optimiser.parts, made.seed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 900}, "says num_hidden_layers 900"),
        ({"num_hidden_layers": 2}, "says num_hidden_layers 2"),
        ({"intermediate_size": 4}, "is needed by"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised .*'awq'"),
    ],
)
def test_an_mllm_whose_config_says_otherwise_than_its_weights_is_refused(
    settings: Make, training_set, tmp_path: Path, changes: dict, said: str
) -> None:
    folder = tmp_path / "mllm"
    shutil.copytree(training_set.mllm, folder)
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    made = settings(model_mllm=str(folder))
    base = load_base(made.model.base)
    with pytest.raises(EasyRefError, match=said):
        build_model(base.unet, made.model, made.optimiser.parts, made.seed)


def test_more_final_layers_than_the_mllm_has_are_refused(settings: Make) -> None:
    asked = settings(model_final_layers=99)
    base = load_base(asked.model.base)
    with pytest.raises(EasyRefError, match=r"final_layers is 99, but the MLLM in .* has \d layers"):
        build_model(base.unet, asked.model, asked.optimiser.parts, seed=0)


@pytest.mark.parametrize("trained", [False, True])
def test_an_mllm_without_weights_in_adapter_or_directory_is_refused(
    settings: Make, training_set, tmp_path: Path, trained: bool
) -> None:
    parts = ["projector", "mllm"] if trained else ["projector"]
    exported = train(settings(optimiser_steps=1, optimiser_parts=parts)).exported
    bare = tmp_path / "bare"
    shutil.copytree(training_set.mllm, bare)
    (bare / "model.safetensors").unlink()
    if trained:
        plan_encoder(load_checkpoint(exported), bare)
        return
    with pytest.raises(EasyRefError, match=r"does not carry the MLLM.*directory holds no weights"):
        plan_encoder(load_checkpoint(exported), bare)


def test_all_processes_read_the_base_model_whatever_accelerates_configuration(
    training_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    configured, seen = "FSDP_CPU_RAM_EFFICIENT_LOADING", []
    read = transformers.CLIPTextModel.from_pretrained

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(os.environ.get(configured))
        return read(*arguments, **options)

    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", spy)
    monkeypatch.setenv(configured, "true")
    load_base(training_set.base)
    assert seen == [None]
    assert os.environ[configured] == "true"


def test_what_is_not_trained_stays_as_it_is_in_the_adapters_file(
    settings: Make, tmp_path: Path
) -> None:
    half = {"optimiser_precision": "bf16"}
    first = train(settings(optimiser_steps=1, **half)).exported
    following = half | {
        "model_adapter": str(first),
        "optimiser_parts": ["projector"],
        "optimiser_steps": 1,
        "optimiser_ema": 0.9,
        "output_folder": str(tmp_path / "next"),
    }
    second = train(settings(**following)).exported
    before = load_file(first)
    for file in (second, second.with_name("easyref_ema.safetensors")):
        after = load_file(file)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert before.keys() == after.keys()
        assert changed
        assert all(name.startswith("image_proj_model.") for name in changed)
