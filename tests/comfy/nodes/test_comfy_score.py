"""EasyRef Score: the benchmark's scores in a graph."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch
from comfyhost import CLIP_MODEL, DINO_MODEL, Pack, gathered
from dynamic_vram import Gpu

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two pictures of soft colours."""
    noise = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (
        torch.nn.functional.interpolate(noise, (30, 44), mode="bicubic").clamp(0, 1).movedim(1, 3)
    )


@pytest.fixture(scope="module")
def others() -> torch.Tensor:
    """Three more."""
    noise = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    return (
        torch.nn.functional.interpolate(noise, (50, 20), mode="bicubic").clamp(0, 1).movedim(1, 3)
    )


@pytest.fixture(autouse=True)
def _nothing_held(pack: Pack) -> Any:
    yield
    pack.part("nodes.host.scoring")._held.clear()


def score(pack: Pack, images: torch.Tensor, **given: Any) -> Any:
    chosen = {"prompt": PROMPT, "clip_model": CLIP_MODEL, "dino_model": DINO_MODEL}
    return pack.nodes["EasyRefScore"].execute(images=images, **(chosen | given))


def by_the_core(pack: Pack, images: torch.Tensor, others: torch.Tensor) -> list[float]:
    embedders = pack.part("easyref_core.evaluation.metrics.embedders")
    tensors = pack.part("easyref_core.pictures.tensors")
    folder = pack.base / "models" / "easyref_score"
    clip = embedders.open_clip(folder / CLIP_MODEL, "clip")
    dino = embedders.open_dino(folder / DINO_MODEL, "dino")

    def embedded(by: Any, batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([by.picture(tensors.tensor_to_picture(one, "x")) for one in batch])

    return [
        (embedded(clip, images) @ embedded(clip, others).T).mean().item(),
        (embedded(clip, images) @ clip.text(PROMPT)).mean().item(),
        (embedded(dino, images) @ embedded(dino, others).T).mean().item(),
    ]


def test_the_scores_are_the_benchmarks_means(
    pack: Pack, images: torch.Tensor, others: torch.Tensor
) -> None:
    result = score(pack, images, reference_images=others)
    found = list(result.result)
    assert found[:3] == pytest.approx(by_the_core(pack, images, others), abs=1e-6)
    assert all(type(value) is float for value in found[:3])
    numbers = [float(n) for n in re.findall(r"(?:-I|-T) (-?\d\.\d{3})", found[3])]
    assert numbers == pytest.approx(found[:3], abs=6e-4)
    assert f"(x 2.5: {2.5 * found[1]:.3f})" in found[3]
    assert result.ui == {"text": (found[3],)}


def test_references_of_both_kinds_count_alike(
    pack: Pack, images: torch.Tensor, others: torch.Tensor
) -> None:
    whole = score(pack, images, reference_images=others)
    group = gathered(pack, others[1:], weight=0.0)
    parts = score(pack, images, reference_images=others[:1], references=group)
    assert parts.result[:3] == pytest.approx(whole.result[:3], abs=1e-6)


def test_a_picture_is_nearest_to_itself(pack: Pack, images: torch.Tensor) -> None:
    clip_i, _, dino_i, _ = score(pack, images[:1], reference_images=images[:1]).result
    assert clip_i == pytest.approx(1)
    assert dino_i == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "nothing", "said"),
    [
        ({"clip_model": "none"}, (0, 1), "CLIP-T left out (clip_model is none)"),
        ({"dino_model": "none"}, (2,), "DINO-I left out (dino_model is none)"),
        ({"prompt": " \n"}, (1,), "CLIP-T left out (no prompt)"),
        ({"reference_images": None}, (0, 2), "CLIP-I left out (no references)"),
    ],
)
def test_what_is_left_out_is_0_and_named(
    pack: Pack,
    images: torch.Tensor,
    others: torch.Tensor,
    given: dict[str, Any],
    nothing: tuple[int, ...],
    said: str,
) -> None:
    *values, text = score(pack, images, **({"reference_images": others} | given)).result
    assert [n for n, value in enumerate(values) if value == 0] == list(nothing)
    assert said in text


def test_what_cannot_be_scored_is_refused(pack: Pack, images: torch.Tensor) -> None:
    with pack.refused("both none", "openai/clip-vit-large-patch14", "models/easyref_score"):
        score(pack, images, clip_model="none", dino_model="none")
    with pack.refused("nothing to compare with"):
        score(pack, images, prompt="")
    with pack.refused("nothing to compare with"):
        score(pack, images, clip_model="none")
    with pack.refused("images holds no picture"):
        score(pack, images[:0])
    with pack.refused("reference_images", "not numbers"):
        score(pack, images, reference_images=images / 0)
    with pack.refused("half of a character"):
        score(pack, images, prompt="\ud83d")


def test_each_list_shows_the_models_of_its_kind(pack: Pack, images: torch.Tensor) -> None:
    def options() -> dict[str, list[str]]:
        inputs = {i.id: i for i in pack.nodes["EasyRefScore"].define_schema().inputs}
        return {name: list(inputs[name].options) for name in ("clip_model", "dino_model")}

    assert options()["clip_model"][:2] == [CLIP_MODEL, "none"]
    assert options()["dino_model"][:2] == [DINO_MODEL, "none"]
    folder = pack.base / "models" / "easyref_score"
    cached = "models--me--dino/snapshots/abc"
    shutil.copytree(folder / DINO_MODEL, folder / cached)
    try:
        assert options()["dino_model"] == sorted([DINO_MODEL, cached]) + options()["clip_model"][1:]
    finally:
        shutil.rmtree(folder / "models--me--dino")
    for name in (DINO_MODEL, "../easyref_score/small_clip", "gone"):
        with pack.refused(name, "no CLIP directory", folder, CLIP_MODEL):
            score(pack, images, clip_model=name)


def test_the_demos_models_are_offered_where_they_are_shipped(
    pack: Pack, images: torch.Tensor, others: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_set = pack.part("easyref_core.demo_set")
    shipped = pack.base / "shipped"
    folder = pack.base / "models" / "easyref_score"
    shutil.copytree(folder / CLIP_MODEL, shipped / "score" / "clip")
    monkeypatch.setattr(demo_set, "TRAINED_SET", shipped)
    inputs = {i.id: i for i in pack.nodes["EasyRefScore"].define_schema().inputs}
    assert list(inputs["clip_model"].options) == [CLIP_MODEL, "none", "demo"]
    assert list(inputs["dino_model"].options) == [DINO_MODEL, "none"]
    plain = score(pack, images, reference_images=others)
    found = score(pack, images, reference_images=others, clip_model="demo")
    assert found.result == plain.result


def test_a_changed_model_is_read_again(
    pack: Pack, images: torch.Tensor, others: torch.Tensor
) -> None:
    import score_models

    folder = pack.base / "models" / "easyref_score"
    shutil.copytree(folder / DINO_MODEL, folder / "changing")
    try:
        given = {"clip_model": CLIP_MODEL, "dino_model": "changing"}
        node = pack.nodes["EasyRefScore"]
        stamps = node.fingerprint_inputs(images=None, prompt="", **given)
        assert node.fingerprint_inputs(images=None, prompt="", **given) == stamps
        first = score(pack, images, reference_images=others, **given)
        with torch.inference_mode(False):
            score_models.write_dinov2(folder / "changing", seed=9)
        assert node.fingerprint_inputs(images=None, prompt="", **given) != stamps
        second = score(pack, images, reference_images=others, **given)
        assert second[0] == first[0]
        assert second[2] != first[2]
        (folder / "changing" / "model.safetensors").write_bytes(b"cut off")
        with pack.refused("model.safetensors"):
            score(pack, images, reference_images=others, **given)
    finally:
        shutil.rmtree(folder / "changing")


def test_models_are_held_between_runs_and_freed_when_memory_is_short(
    pack: Pack, images: torch.Tensor, others: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm

    scoring = pack.part("nodes.host.scoring")
    first = score(pack, images, reference_images=others)
    held = {name: patcher for name, (_, patcher) in scoring._held.items()}
    assert sorted(held) == ["CLIP", "DINO"]
    assert score(pack, images, reference_images=others).result == first.result
    assert {name: patcher for name, (_, patcher) in scoring._held.items()} == held

    def run_out(*args: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(held["CLIP"].model, "picture", run_out)
    with pack.refused("Not enough memory to score pictures with CLIP"):
        score(pack, images, reference_images=others)
    assert scoring._held == {}
    assert mm.current_loaded_models == []
    assert score(pack, images, reference_images=others).result == first.result


def test_a_run_can_be_interrupted_between_pictures(pack: Pack, images: torch.Tensor) -> None:
    import comfy.model_management as mm

    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        score(pack, images)


@pytest.mark.parametrize("full", [False, True])
def test_models_run_on_a_gpu_whole(
    pack: Pack, plain_gpu: Gpu, images: torch.Tensor, others: torch.Tensor, full: bool
) -> None:
    plain_gpu.full = full
    with plain_gpu.waiting_allowed():
        *_, text = score(pack, images, reference_images=others).result
    assert "left out" not in text
