"""A set's decoder, trained further."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from easyref_core.demo_set import read_stored_weights
from workshop.demo.dataset.files import DatasetOptions, write_dataset
from workshop.demo.pretraining import sharpen
from workshop.demo.stored_weights import WEIGHTS
from workshop.demo.tiny import write_tiny_set


def test_only_the_decoder_changes_and_the_same_way_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharpen, "_PICTURES", 4)
    models = write_tiny_set(tmp_path / "set")
    data = write_dataset(tmp_path / "data", DatasetOptions(groups=5, held_out_groups=1), workers=1)
    found = []
    for name in ("one", "two"):
        assert sharpen.main([str(models), str(data), str(tmp_path / name), "--steps", "2"]) == 0
        found.append(load_file(tmp_path / name / WEIGHTS))
    before = read_stored_weights(models / "vae" / WEIGHTS)
    assert found[0].keys() == before.keys()
    changed = {n for n, w in found[0].items() if not torch.equal(w, before[n].half())}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert all(torch.equal(w, found[1][name]) for name, w in found[0].items())
    assert sharpen.main([str(models), str(data), str(tmp_path / "none"), "--steps", "0"]) == 1
    assert "--steps is 0" in capsys.readouterr().err


def test_the_unets_latents_are_near_the_exact_ones_and_not_the_same(tmp_path: Path) -> None:
    models = write_tiny_set(tmp_path / "set")
    exact = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    found = sharpen.sampled_latents(models, exact, ["", "a star shape", ""], generator)
    assert found.shape == exact.shape
    error = (found - exact).abs().amax((1, 2, 3))
    assert ((error > 0) & (error < 10)).all()
