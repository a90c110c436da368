"""Validation images, and the estimate of the memory that a run needs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.training.config import Settings
from easyref_core.training.loop import TrainingRun, train
from easyref_core.training.memory import FACTORS, estimate_bytes

Make = Callable[..., Settings]
BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "training_memory.py"


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_validation_shows_faces_and_names_unreadable_records(
    settings: Make, training_set: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = json.loads(training_set.records.read_text())[0]
    face = {"face": [[10, 10, 50, 50, 0.9]], "text": "a face", "target": group["target"]}
    missing = {"image_file": ["gone.png"], "text": "none", "target": group["target"]}
    file = write(tmp_path / "few.json", [group, face, missing, {"text": "no target"}])
    changes = {"optimiser_steps": 1, "model_aggregation": "average"}
    train(settings(output_validation=file, **changes))
    said = capsys.readouterr().err
    assert "few.json[2]: There is no picture" in said
    assert "few.json[3]: it has no target." in said
    run = TrainingRun(settings(output_validation=file, **changes))
    assert [len(group.pictures) for group in run.validation] == [3, 1]
    assert run.validation[1].caption == "a face"
    with Image.open(tmp_path / "run" / "validation" / "0000001.png") as sheet:
        cell = sheet.height // 2
        generated = sheet.crop((cell, cell + 9, 2 * cell - 9, 2 * cell - 9))  # behind the face
        assert all(low < high for low, high in generated.getextrema())


def test_the_vae_decodes_in_float32_whatever_the_precision(
    settings: Make, training_set: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "few.json", json.loads(training_set.records.read_text())[:1])
    run = TrainingRun(settings(output_validation=file, optimiser_precision="bf16"))
    run.base.to(run.accelerator.device, run.dtype)
    found = set()
    for module in run.base.vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, out: found.add(out.dtype))
    run.validate(1)
    assert found == {torch.float32}


@pytest.mark.parametrize(
    ("content", "sentence"), [({}, "not a list of records"), ([{"text": "a"}], "can be used")]
)
def test_a_bad_validation_file_is_refused_before_anything_is_loaded(
    settings: Make, tmp_path: Path, content: object, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "easyref_core.training.loop.load_base", lambda *_: pytest.fail("loaded models")
    )
    with pytest.raises(EasyRefError, match=sentence):
        train(settings(output_validation=write(tmp_path / "bad.json", content)))


def test_the_memory_estimate_follows_the_settings(settings: Make) -> None:
    def estimate(shares: tuple[int, int] = (1, 1), **changes: Any) -> dict[str, int]:
        run = TrainingRun(settings(**changes))
        assert run.estimate() == estimate_bytes(run.model, run.base, run.settings, 3)
        return estimate_bytes(run.model, run.base, run.settings, 3, shares)

    plain = estimate()
    assert "average" not in plain
    assert estimate(optimiser_ema=0.9)["average"] == plain["optimiser"] // 3
    saving = estimate(optimiser_gradient_checkpointing=True)
    assert saving["activations"] < plain["activations"] / 2
    frozen = estimate(optimiser_parts=["projector"])
    assert frozen["activations"] < plain["activations"]
    assert estimate(optimiser_batch_size=4)["activations"] == 2 * plain["activations"]
    levels = [estimate(optimiser_noise_levels=n)["activations"] for n in (1, 2, 3)]
    assert plain["activations"] == levels[0] < levels[1] < 2 * levels[0]  # the MLLM's stay
    assert levels[2] - levels[1] == pytest.approx(levels[1] - levels[0], abs=2)
    assert estimate((1, 2))["optimiser"] == plain["optimiser"] // 2
    assert estimate((2, 2))["weights"] < plain["weights"]


def test_the_estimates_factors_are_the_measured_ones() -> None:
    spec = importlib.util.spec_from_file_location("training_memory", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure()
    for part, factors in FACTORS.items():
        counted = [found[f"{part}, {mode}"]["factor"] for mode in ("plain", "checkpointed")]
        assert counted == pytest.approx(factors, rel=0.05), part
