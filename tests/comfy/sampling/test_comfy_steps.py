"""What a sampling step costs: no waiting for the device, and nothing computed twice."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import (
    Pack,
    apply,
    euler,
    guider,
    latents,
    predict,
    random_text,
    random_tokens,
    sigmas,
)
from device_waits import waits

CFG = 5.0


@pytest.fixture
def full(pack: Pack, unet: Any, fresh_easyref: Any) -> Any:
    """Everything that Apply can do at once: mask, window, groups, two Apply nodes."""
    both = random_tokens(pack, fresh_easyref, seed=1, batch=2)
    settings = {"mask": torch.rand(2, 40, 70), "start_percent": 0.05, "end_percent": 0.7}
    model = apply(pack, unet, fresh_easyref, both, **settings)
    one = random_tokens(pack, fresh_easyref, seed=2)
    return apply(pack, model, fresh_easyref, one, weight=0.4, mask=torch.rand(1, 8, 8))


def test_a_step_never_waits_for_the_device(comfyui: Path, full: Any) -> None:
    steps = sigmas(full, 901.0, 601.0, 301.0)
    x = latents(2) * 14
    euler(guider(full, CFG), x, steps)
    with waits(comfyui) as result:
        euler(guider(full, CFG), x, steps)
    assert not result


def test_a_wait_is_detected(
    comfyui: Path, pack: Pack, unet: Any, fresh_easyref: Any, tokens: Any
) -> None:
    """The watch itself works: the first call reads and checks the keys and values, and waits."""
    model = apply(pack, unet, fresh_easyref, tokens)
    with waits(comfyui) as result:
        predict(model, CFG)
    assert {place.split(" at ")[0] for place in result} >= {"__bool__", "_local_scalar_dense", "to"}
    assert {place.split(" at ")[1].split(":")[0] for place in result} == {
        "easyref_core/adapter/key_values.py",
        "easyref_core/weight_file/tensors.py",
    }


@pytest.fixture
def projections(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tokens, device and dtype of every projection to keys and values."""
    store = pack.part("nodes.host.key_value_cache")
    project, computed = store.project_tokens, []

    def noted(checkpoint: Any, tokens: Any, device: Any, dtype: Any) -> Any:
        computed.append((tokens, device, dtype))
        return project(checkpoint, tokens, device, dtype)

    monkeypatch.setattr(store, "project_tokens", noted)
    return computed


def test_keys_and_values_are_computed_once_for_all_steps_texts_and_sizes(
    pack: Pack, unet: Any, fresh_easyref: Any, projections: list[Any]
) -> None:
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    model = apply(pack, unet, fresh_easyref, tokens)
    euler(guider(model, CFG), latents(2) * 14, sigmas(model, 901.0, 601.0, 301.0))
    predict(model, CFG, latents(1, 24, 8), positive=random_text(1))
    assert [projection[0] for projection in projections] == [tokens]


def test_another_apply_with_the_same_tokens_computes_none_again(
    pack: Pack, unet: Any, fresh_easyref: Any, projections: list[Any]
) -> None:
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    for weight in (1.0, 0.5):
        model = apply(pack, unet, fresh_easyref, tokens, weight=weight)
        predict(apply(pack, model, fresh_easyref, tokens, weight=0.2), CFG)
    assert [projection[0] for projection in projections] == [tokens]


def test_other_tokens_and_other_precisions_are_computed_separately(
    pack: Pack, unet: Any, fresh_easyref: Any, projections: list[Any]
) -> None:
    tokens = [random_tokens(pack, fresh_easyref, seed) for seed in (1, 2)]
    predict(apply(pack, unet, fresh_easyref, tokens[0]), CFG)
    predict(apply(pack, unet, fresh_easyref, tokens[1]), CFG)
    fresh_easyref.key_values.get(tokens[1], torch.device("cpu"), torch.bfloat16)
    cpu = torch.device("cpu")
    assert projections == [
        (tokens[0], cpu, torch.float32),
        (tokens[1], cpu, torch.float32),
        (tokens[1], cpu, torch.bfloat16),
    ]


def test_weight_zero_computes_none(
    pack: Pack, unet: Any, fresh_easyref: Any, projections: list[Any]
) -> None:
    tokens = random_tokens(pack, fresh_easyref, seed=1)
    predict(apply(pack, unet, fresh_easyref, tokens, weight=0.0), CFG)
    assert projections == []


def test_a_mask_is_resized_once_for_each_resolution(
    pack: Pack, demo: Any, demo_easyref: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = pack.part("nodes.sampling.masks")
    resize, sizes = masks._resize, []

    def noted(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
        sizes.append((height, width))
        return resize(mask, height, width)

    monkeypatch.setattr(masks, "_resize", noted)
    tokens = random_tokens(pack, demo_easyref, seed=1)
    model = apply(pack, demo.model, demo_easyref, tokens, mask=torch.rand(1, 64, 64))
    for _ in range(2):
        predict(model, CFG, latents(2, 16, 16), positive=random_text(1, pooled=64),
                negative=random_text(2, pooled=64))  # fmt: skip
    assert sorted(sizes) == [(4, 4), (8, 8)]


def test_the_projections_do_not_stay_in_memory(
    pack: Pack, unet: Any, fresh_easyref: Any, tokens: Any
) -> None:
    """At real size they are 340 million parameters."""
    predict(apply(pack, unet, fresh_easyref, tokens), CFG)
    (layer, parts), *_ = fresh_easyref.checkpoint.cross_attention.items()
    weight = fresh_easyref.checkpoint.file.read(parts)["to_k_ip"]

    def in_memory() -> int:
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and not t.is_nested]
        return sum(t.shape == weight.shape and torch.equal(t.to(weight), weight) for t in tensors)

    assert in_memory() == 1, f"{layer} is kept beside the one read here"
