"""The form in which a model set stores large weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyref_core.demo_set import STORED_SCALE, TRAINED_SET, read_stored_weights
from easyref_core.weight_file import open_weight_file
from workshop.demo.stored_weights import (
    ADAPTER,
    PARTS,
    WEIGHTS,
    copy_adapter,
    main,
    quantised,
    write_stored,
)

LARGE, SMALL, NORM = "conv.weight", "gate.weight", "norm.weight"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Channels of very different magnitudes, one of them all zeros."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(64, 32, 3, 3, generator=generator)
    large *= torch.logspace(-7, 1, 64)[:, None, None, None]
    large[3] = 0
    return {
        LARGE: large.half(),
        SMALL: torch.randn(8, 8, generator=generator).half(),
        NORM: torch.randn(9000, generator=generator).half(),
    }


def test_large_weights_are_stored_in_one_byte_and_read_within_half_a_step(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / WEIGHTS
    write_stored(path, weights)
    stored, read = load_file(path), read_stored_weights(path)
    assert stored[LARGE].dtype == torch.int8
    assert stored[LARGE + STORED_SCALE].shape == (64, 1, 1, 1)
    assert read.keys() == weights.keys()
    assert {tensor.dtype for tensor in read.values()} == {torch.float16}
    assert all(torch.equal(read[name], weights[name]) for name in (SMALL, NORM))
    error = (read[LARGE].float() - weights[LARGE].float()).abs()
    largest = weights[LARGE].float().abs().amax(dim=(1, 2, 3), keepdim=True)
    # half a step of 1/127, and a little for the scale's own rounding and float16's
    assert (error <= largest * 0.006 + 4e-6).all()


def test_weights_that_were_read_back_are_stored_as_the_same_numbers(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / WEIGHTS
    write_stored(path, weights)
    once = load_file(path)
    again = quantised(read_stored_weights(path))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_set_in_float16_is_converted_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TRAINED_SET / "vae" / WEIGHTS
    for part in PARTS[:2]:
        shutil.copytree(TRAINED_SET / part, tmp_path / part)
    halves = read_stored_weights(original)
    save_file(halves, tmp_path / "vae" / WEIGHTS)
    main([str(tmp_path)])
    assert (tmp_path / "vae" / WEIGHTS).read_bytes() == original.read_bytes()
    assert (tmp_path / "unet" / WEIGHTS).read_bytes() == (
        TRAINED_SET / "unet" / WEIGHTS
    ).read_bytes()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_adapters_large_weights_are_stored_as_fp8_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)).half()
    large[3] = 0
    weights = {
        "linear.weight": large,
        "small.weight": large[:8].clone(),
        "norm.weight": large[0].clone(),
    }
    source, stored = tmp_path / "trained.safetensors", tmp_path / ADAPTER
    save_file(weights, source, {"image_size": "112"})
    copy_adapter(source, stored)
    assert stored.stat().st_size < source.stat().st_size
    file = open_weight_file(stored)
    read = file.read({name: name for name in weights})
    assert file.metadata["image_size"] == "112"
    assert file.tensors.keys() == weights.keys()
    assert all(torch.equal(read[n], weights[n]) for n in ("small.weight", "norm.weight"))
    # fp8 has three digits after the first: half a step is a sixteenth of a value
    error = (read["linear.weight"] - large.float()).abs()
    assert (error <= large.float().abs() / 16 + large.abs().amax(1, keepdim=True) / 448).all()
    before = load_file(stored)
    main([str(tmp_path)])
    after = load_file(stored)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].float(), w.float()) for name, w in before.items())
    assert capsys.readouterr().out.startswith(f"{stored}: ")
