"""A safetensors header is believed only where it accounts for every byte of the file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from safetensors.torch import save_file

from easyref_core.weight_file import open_weight_file
from easyref_core.weight_file.safetensors_header import MAX_HEADER


def write(path: Path, header: Any, data: int = 16, length: int | None = None) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write((len(content) if length is None else length).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + data)
    return path


def tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


def test_every_tensor_is_as_safetensors_wrote_it(tmp_path: Path) -> None:
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool")
    tensors = {kind: (torch.randn(5, 7) * 4).to(getattr(torch, kind)) for kind in kinds}
    tensors |= {"number": torch.tensor(2.5), "nothing": torch.empty(0, 3)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"key": "value"})
    file = open_weight_file(path)
    assert file.metadata == {"key": "value"}
    with file.open() as get:
        for name, wanted in tensors.items():
            assert torch.equal(get(name), wanted), name
            assert get(name).dtype == wanted.dtype
            assert file.tensors[name].shape == wanted.shape
        assert torch.equal(get("float32", 2), tensors["float32"][:2])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{" + b'"a":' * 3, "JSON"),
        (b'{"a":' + b"[" * 100_000, "nested"),
        ({"a": []}, "'a' is a list"),
        (tensor(dtype=5), "dtype"),
        (tensor(shape="4"), "shape"),
        (tensor(shape=[-4]), "size"),
        (tensor(shape=[True] * 4), "size"),
        (tensor(shape=[2.5]), "size"),
        (tensor(shape=[1] * 100 + [4]), "shape"),
        (tensor(shape=[10**30, 10**30]), "cannot lie"),
        (tensor(shape=[5]), "cannot lie"),
        (tensor(dtype="float32", shape=[2**40]), "cannot lie"),  # PyTorch's name
        (tensor(data_offsets=[0]), "data_offsets"),
        (tensor(data_offsets=[16, 0]), "cannot lie"),
        (tensor(data_offsets=[4, 20]), "starts at byte 4"),
        (tensor() | {"b": tensor()["a"]}, "starts at byte 0"),
        (tensor() | {"__metadata__": {"x": 1}}, "metadata"),
        (tensor() | {"__metadata__": []}, "metadata"),
        (tensor(dtype="F32", shape=[2], data_offsets=[0, 8]), "end at byte"),
        (tensor(shape=[8], data_offsets=[0, 32]), "cut off"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: Any, said: str) -> None:
    path = write(tmp_path / "a.safetensors", header)
    with goldens.refused(said.replace("'a' is", "a is"), path):
        open_weight_file(path)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", b"{", 3 * 2**30, MAX_HEADER + 1)
    start = time.perf_counter()
    with goldens.refused(path, "header"):
        open_weight_file(path)
    assert time.perf_counter() - start < 1


def test_names_are_printed_without_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"\x1b[2J": {}})
    with goldens.refused("\\x1b[2J"):
        open_weight_file(path)
