"""Pictures of base models from prompts alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from workshop.demo.evaluation.base_samples import CHECKPOINT_FILE, main
from workshop.demo.pretraining.base import BaseModel

Capture = pytest.CaptureFixture[str]


def test_checkpoints_are_compared_on_the_same_prompts_and_noise(
    tmp_path: Path, capsys: Capture
) -> None:
    torch.manual_seed(0)
    model = BaseModel()
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    for name, factor in (("one", 1.0), ("same", 1.0), ("other", 0.5)):
        (tmp_path / name).mkdir()
        weights = {key: (w.detach() * factor).contiguous() for key, w in trained.items()}
        save_file(weights, tmp_path / name / CHECKPOINT_FILE)
    bases = [str(tmp_path / name) for name in ("one", "same", "other")]
    sheet = tmp_path / "sheet.png"
    options = ["--pictures", "2", "--steps", "1"]
    assert main([str(sheet), *bases, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["drawn", "reconstructed", *bases]
    assert lines[0].startswith("drawn: identity 100.0%")
    picture = Image.open(sheet)
    wide, row = picture.width, picture.height // 5
    pixels = [picture.crop((190, row * n, wide, row * (n + 1))).tobytes() for n in range(5)]
    assert pixels[2] == pixels[3] != pixels[4]


def test_what_is_no_base_model_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert main([str(tmp_path / "a.png"), str(tmp_path), "--pictures", "1"]) == 1
    assert "neither a model set" in capsys.readouterr().err
    save_file({"other": torch.zeros(2)}, tmp_path / CHECKPOINT_FILE)
    assert main([str(tmp_path / "a.png"), str(tmp_path), "--pictures", "1"]) == 1
    assert "does not hold the demo's base model" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
