"""Reading the weights of faces' networks: what is wrong with a folder is said in a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from face_model_folder import manifest_path, read_manifest, write_face_model, write_manifest

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.metrics.faces import FaceModel
from easyref_core.evaluation.metrics.faces.networks import FaceDetector, FaceLandmarks
from easyref_core.evaluation.metrics.faces.weights import load_weights

NAME = "tiny_face_detector_model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_face_model(tmp_path / "model", NAME)


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    """Edit the first weight of the manifest."""
    groups = read_manifest(folder, NAME)
    edit(groups[0]["weights"][0])
    write_manifest(folder, NAME, groups)


def refusal(folder: Path) -> str:
    with pytest.raises(EasyRefError) as refused:
        load_weights(FaceDetector(), folder, NAME)
    return str(refused.value)


def test_bytes_stand_for_scaled_values(folder: Path) -> None:
    stored = np.fromfile(folder / f"{NAME}.bin", np.uint8, 3 * 3 * 3 * 16)
    network = FaceDetector()
    load_weights(network, folder, NAME)
    expected = stored.reshape(3, 3, 3, 16) * 0.001 - 0.128
    torch.testing.assert_close(network.conv0.filters.double(), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_weights_of_other_types_are_read(folder: Path, dtype: str) -> None:
    groups = read_manifest(folder, NAME)
    entries, content = groups[0]["weights"], b""
    for entry in entries:
        values = np.arange(np.prod(entry["shape"])) % 1000
        content += values.astype(dtype).tobytes()
        if dtype == "float32":
            del entry["quantization"]
        else:
            entry["quantization"] = {"dtype": dtype, "scale": 1, "min": 0}
    (folder / f"{NAME}.bin").write_bytes(content)
    write_manifest(folder, NAME, groups)
    network = FaceDetector()
    load_weights(network, folder, NAME)
    assert network.conv8.bias.tolist() == list(range(25))


def test_weights_may_lie_in_several_files(folder: Path) -> None:
    whole = FaceDetector()
    checksum = load_weights(whole, folder, NAME)
    content = (folder / f"{NAME}.bin").read_bytes()
    (folder / "shard1").write_bytes(content[:1000])
    (folder / "shard2").write_bytes(content[1000:])
    groups = read_manifest(folder, NAME)
    groups[0]["paths"] = ["shard1", "shard2"]
    write_manifest(folder, NAME, groups)
    parts = FaceDetector()
    assert load_weights(parts, folder, NAME) == checksum
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_missing_folder_is_said_with_where_it_is_had(tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match="@vladmandic/face-api"):
        FaceModel(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [f"{NAME}-weights_manifest.json", f"{NAME}.bin"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)


def test_a_file_that_is_cut_off_is_refused(folder: Path) -> None:
    path = folder / f"{NAME}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut off" in refusal(folder)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    with pytest.raises(EasyRefError, match="another network"):
        load_weights(FaceLandmarks(), folder, NAME)


@pytest.mark.parametrize(
    "edit",
    [
        lambda weight: weight.update(name="conv9/filters"),
        lambda weight: weight.update(shape=[3, 3, 16, 3]),
        lambda weight: weight.update(shape=[3, -3, 3, -16]),
        lambda weight: weight.update(shape=[1e30]),
        lambda weight: weight.update(shape=[0.5]),
        lambda weight: weight.update(shape="3, 3"),
        lambda weight: weight.update(shape=[64_000_000] * 1000),
        lambda weight: weight.update(name=["conv0/filters"]),
        lambda weight: weight.update(dtype="int32"),
        lambda weight: weight.update(quantization=[1]),
        lambda weight: weight["quantization"].update(dtype="complex128"),
        lambda weight: weight["quantization"].update(dtype=["uint8"]),
        lambda weight: weight["quantization"].update(scale=float("nan")),
        lambda weight: weight["quantization"].update(scale=1e300),
        lambda weight: weight["quantization"].update(min="0"),
        lambda weight: weight["quantization"].clear(),
    ],
)
def test_a_wrong_weight_is_named(folder: Path, edit: Callable[[dict], object]) -> None:
    change(folder, edit)
    assert f"{NAME}-weights_manifest.json" in refusal(folder)


def test_values_that_are_no_numbers_are_refused(folder: Path) -> None:
    groups = read_manifest(folder, NAME)
    del groups[0]["weights"][1:]
    del groups[0]["weights"][0]["quantization"]
    write_manifest(folder, NAME, groups)
    np.full(3 * 3 * 3 * 16, np.nan, np.float32).tofile(folder / f"{NAME}.bin")
    assert "not finite" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        "[{}]",
        '[{"weights": [], "paths": [5]}]',
        '[{"weights": [7], "paths": []}]',
        "[" * 100_000,
        '[{"weights": [], "paths": ["../x"]}]',
        '[{"weights": [], "paths": ["/etc/hostname"]}]',
    ],
)
def test_a_manifest_that_is_none_is_refused(folder: Path, content: str) -> None:
    manifest_path(folder, NAME).write_text(content)
    (folder.parent / "x").write_bytes(b"")
    refusal(folder)


def test_a_pipe_in_place_of_weights_is_not_waited_for(folder: Path) -> None:
    path = folder / f"{NAME}.bin"
    path.unlink()
    os.mkfifo(path)
    assert "pipe" in refusal(folder)


def test_a_file_without_end_is_not_read(folder: Path) -> None:
    with (folder / f"{NAME}.bin").open("wb") as file:
        file.truncate(2**40)
    assert "larger" in refusal(folder)
