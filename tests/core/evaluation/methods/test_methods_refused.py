"""Files that are missing or of the wrong kind are refused before an image is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import refused
from ip_adapter_files import plain_projection, write_image_encoder, write_ip_adapter
from safetensors.torch import load_file, save_file

from easyref_core.evaluation.methods import METHODS
from easyref_core.evaluation.methods.load import load_methods
from easyref_core.evaluation.methods.pipeline import GenerationPipeline
from easyref_core.evaluation.methods.settings import GenerationSettings
from easyref_core.evaluation.trials import Trial

MakeTrial = Callable[..., Trial]


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        GenerationPipeline, "pipe", property(lambda _: pytest.fail("weights were read"))
    )


@pytest.mark.parametrize(
    ("method", "field", "said"),
    [
        ("easyref", "adapter", "--adapter: an EasyRef adapter"),
        ("average", "mllm", "--mllm: the folder of Qwen/Qwen2-VL-2B-Instruct"),
        ("ip-adapter", "ip_adapter", "--ip-adapter: an IP-Adapter of SDXL"),
        ("ip-adapter", "image_encoder", "--image-encoder: the folder of"),
    ],
)
def test_what_is_not_given_is_named(
    method: str, field: str, said: str, settings: GenerationSettings, make_trial: MakeTrial
) -> None:
    with refused(f"The method {method} needs {said}"):
        load_methods(replace(settings, **{field: None}), [make_trial(method)])


@pytest.mark.parametrize("field", ["base", "adapter", "mllm", "ip_adapter", "image_encoder"])
def test_files_that_are_not_there_are_named(
    field: str, settings: GenerationSettings, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trials = [make_trial("easyref"), make_trial("ip-adapter")]
    with refused(tmp_path / "nowhere"):
        load_methods(replace(settings, **{field: tmp_path / "nowhere"}), trials)


def test_an_adapter_of_a_variant_needs_no_other(
    settings: GenerationSettings, tiny: Any, make_trial: MakeTrial
) -> None:
    trial = make_trial("easyref", adapter=str(tiny.adapter))
    load_methods(replace(settings, adapter=None), [trial])
    with refused("nowhere.safetensors"):
        load_methods(settings, [make_trial("easyref", adapter="nowhere.safetensors")])


def test_an_adapter_of_another_unet_is_refused(
    settings: GenerationSettings, tiny: Any, make_trial: MakeTrial, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny.base, tmp_path / "other")
    config = json.loads((other / "unet" / "config.json").read_text())
    config["transformer_layers_per_block"] = [1, 1, 1]
    (other / "unet" / "config.json").write_text(json.dumps(config))
    with refused("The base model has", "cross-attention layers"):
        load_methods(replace(settings, base=other), [make_trial("easyref")])
    with refused("is an IP-Adapter for another UNet"):
        load_methods(replace(settings, base=other), [make_trial("ip-adapter")])


def test_an_ip_adapter_for_stable_diffusion_15_is_refused(
    settings: GenerationSettings, tiny: Any, make_trial: MakeTrial, tmp_path: Path
) -> None:
    path = tmp_path / "ip-adapter_sd15.safetensors"
    write_ip_adapter(path, tiny.base, plain_projection, cross_attention_dim=768)
    with refused(path, "for text of width 768 (Stable Diffusion 1.5's)", "h94/IP-Adapter"):
        load_methods(replace(settings, ip_adapter=path), [make_trial("ip-adapter")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ip_adapter.1.to_q_lora.up.weight": (4, 4)}, "an IP-Adapter for faces"),
        ({"image_proj.proj.0.weight": (4, 4)}, "an IP-Adapter for faces"),
        ({"image_proj.proj.weight": (96, 24)}, "projects images in another way"),
        ({"ip_adapter.1.to_k_ip.weight": (3, 96)}, "for another UNet"),
        ({"ip_adapter.99.to_k_ip.weight": (64, 96)}, "for another UNet"),
    ],
)
def test_other_kinds_of_ip_adapters_are_refused(
    change: dict[str, tuple[int, ...]],
    said: str,
    settings: GenerationSettings,
    tiny: Any,
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    path = tmp_path / "other.safetensors"
    more = {name: torch.zeros(shape) for name, shape in change.items()}
    save_file(load_file(tiny.ip_adapter) | more, path)
    with refused(path, said):
        load_methods(replace(settings, ip_adapter=path), [make_trial("ip-adapter")])


def test_what_is_no_ip_adapter_is_refused(
    settings: GenerationSettings, tiny: Any, make_trial: MakeTrial
) -> None:
    with refused(tiny.adapter, "is no IP-Adapter"):
        load_methods(replace(settings, ip_adapter=tiny.adapter), [make_trial("ip-adapter")])


def test_the_image_encoder_must_be_the_ip_adapters(
    settings: GenerationSettings, tiny: Any, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trial = make_trial("ip-adapter")
    wide = write_image_encoder(tmp_path / "wide", projection_dim=40, hidden_size=48)
    with refused("reads images of width 24, but the image encoder", wide, "gives width 40"):
        load_methods(replace(settings, image_encoder=wide), [trial])
    plus = replace(settings, ip_adapter=tiny.ip_adapter_plus, image_encoder=wide)
    with refused("reads images of width 32", "gives width 48"):
        load_methods(plus, [trial])
    with refused("holds no CLIP vision model"):
        load_methods(replace(settings, image_encoder=tiny.mllm), [trial])
    (wide / "config.json").write_text("[")
    with refused("config.json", "cannot be read as JSON"):
        load_methods(replace(settings, image_encoder=wide), [trial])


def test_the_identity_tells_files_apart(
    settings: GenerationSettings, tiny: Any, make_trial: MakeTrial, tmp_path: Path
) -> None:
    trials = [make_trial(name, group) for name in METHODS for group in (0, 1)]
    before = {n: m.identity() for n, m in load_methods(settings, trials).items()}
    changed = {}
    for field in ("adapter", "ip_adapter"):
        path = tmp_path / getattr(tiny, field).name
        weights = load_file(getattr(tiny, field))
        name = next(n for n in weights if "to_k_ip" in n)
        save_file(weights | {name: weights[name] * 2}, path)
        changed[field] = path
    changed["image_encoder"] = write_image_encoder(tmp_path / "encoder", num_hidden_layers=4)
    changed["lora"] = replace(settings.lora, steps=9)
    affected = {
        "adapter": {"easyref", "easyref-other", "average", "concatenate"},
        "ip_adapter": {"ip-adapter"},
        "image_encoder": {"ip-adapter"},
        "lora": {"lora", "lora-other"},
    }
    for field, value in changed.items():
        methods = load_methods(replace(settings, **{field: value}), trials)
        assert {n for n, m in methods.items() if m.identity() != before[n]} == affected[field]
