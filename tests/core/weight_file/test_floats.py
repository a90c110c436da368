"""Numbers of weights are the same without PyTorch as with it, bit for bit."""

from __future__ import annotations

from pathlib import Path

import goldens
import pytest
import torch

from easyref_core.weight_file import open_weight_file
from easyref_core.weight_file.dtypes import SAFETENSORS, SIZES, WEIGHTS
from easyref_core.weight_file.floats import as_float32, multiplied

ONE_BYTE = ("float8_e4m3fn", "float8_e5m2", "int8")
READ = sorted({*WEIGHTS, *ONE_BYTE})
EXTREMES = [0.0, -0.0, 1.0, -1 / 3, 1e-45, 1e-40, 6e-8, 65504.0, 3e38, -3.4e38, 1e300, 2.0**-149]


def content(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def numbers(dtype: str) -> torch.Tensor:
    """Every number of one byte; of other dtypes those that are near a limit, and random ones."""
    if dtype in ONE_BYTE:
        return torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    some = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat((torch.tensor(EXTREMES, dtype=torch.float64), some)).to(getattr(torch, dtype))


def same(found: bytes, wanted: torch.Tensor) -> bool:
    """Which bits make a NaN does not matter."""
    numbers = torch.frombuffer(bytearray(found), dtype=torch.float32)
    both_nan = numbers.isnan() & wanted.isnan()
    return bool((both_nan | (numbers.view(torch.int32) == wanted.view(torch.int32))).all())


@pytest.mark.parametrize("dtype", READ)
def test_numbers_become_float32_as_torch_converts_them(dtype: str) -> None:
    given = numbers(dtype)
    assert same(as_float32(content(given), dtype).tobytes(), given.float())


@pytest.mark.parametrize("factor", [1.0, -0.1, 3e38, 1e-38, 2.0**-149])
@pytest.mark.parametrize("dtype", READ)
def test_products_are_rounded_as_torch_rounds_them(dtype: str, factor: float) -> None:
    given, factor = numbers(dtype), torch.tensor(factor).item()
    assert same(multiplied(content(given), dtype, factor), given.float() * factor)


def test_numbers_have_the_bytes_that_torch_gives_them() -> None:
    known = {name: getattr(torch, name) for name in SIZES if hasattr(torch, name)}
    assert {name: dtype.itemsize for name, dtype in known.items()} == {n: SIZES[n] for n in known}
    assert known.keys() >= WEIGHTS
    assert SIZES.keys() >= WEIGHTS | set(SAFETENSORS.values())


@pytest.mark.parametrize("dtype", READ)
@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.linspace(-2, 3, 6)[:, None]])
def test_a_scaled_weight_has_the_same_bytes_as_its_tensor(
    tmp_path: Path, dtype: str, scale: torch.Tensor
) -> None:
    weight = (torch.randn(6, 8) * 10).to(getattr(torch, dtype))
    tensors = {"x.weight": weight, "x.weight_scale": scale.half()}
    if dtype == "int8":
        mark = b'{"format": "int8_tensorwise"}'
        tensors["x.comfy_quant"] = torch.tensor([*mark], dtype=torch.uint8)
    file = open_weight_file(goldens.write(tmp_path / "a.safetensors", tensors))
    with file.open() as get, file.open_bytes() as get_bytes:
        for rows in (None, 1, 4, 9):
            assert get_bytes("x.weight", rows) == content(get("x.weight", rows))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_of_any_strides_has_the_same_bytes(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(6, 8, 5)
    tensors = {
        "plain": base,
        "turned": base.permute(2, 0, 1),
        "part": base[1:5:2, ::3, 2:],
        "halves": base.bfloat16().permute(1, 2, 0),
        "bytes": base.to(torch.float8_e5m2).transpose(0, 2),
        "long": base.double().mT,
        "column": base[:, :1, 0],
        "repeated": torch.as_strided(base.flatten(), (4, 5), (0, 1)),
        "number": base[3, 4, 2],
        "nothing": base[:, :0].mT,
    }
    path = tmp_path / "a.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    file = open_weight_file(path)
    with file.open_bytes() as get:
        for name, wanted in tensors.items():
            assert get(name) == content(wanted), name
            rows = wanted[:2] if wanted.ndim else wanted
            assert get(name, 2) == content(rows), name
