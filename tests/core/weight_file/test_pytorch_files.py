"""Tensors of PyTorch files lie where the file says, whatever their dtype and strides."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.weight_file import WeightFile, open_weight_file
from easyref_core.weight_file.pytorch_index import MAX_INDEX

FORMS = [True, False]


def opened(path: Path, content: Any, zipped: bool = True, protocol: int = 2) -> WeightFile:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return open_weight_file(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", FORMS)
def test_every_tensor_is_as_torch_wrote_it(tmp_path: Path, zipped: bool, protocol: int) -> None:
    base = torch.randn(6, 8)
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool", "complex64")
    tensors = {kind: (base * 3).to(getattr(torch, kind)) for kind in kinds}
    tensors |= {
        "transposed": base.t(),
        "part": base[2:5, 1:7:2],
        "row": base[3],
        "number": torch.tensor(4.5),
        "nothing": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base * 2),
        "one byte": base.to(torch.float8_e4m3fn),
    }
    file = opened(tmp_path / "a.pt", OrderedDict(tensors), zipped, protocol)
    assert list(file.tensors) == list(tensors)
    with file.open() as get:
        for name, wanted in tensors.items():
            found = get(name)
            assert found.dtype == wanted.dtype, name
            assert found.shape == wanted.shape, name
            view = torch.uint8 if wanted.itemsize == 1 else wanted.dtype
            assert torch.equal(found.view(view), wanted.detach().contiguous().view(view)), name
        assert torch.equal(get("transposed", 2), base.t()[:2])
        assert torch.equal(get("float32", 2), tensors["float32"][:2])


@pytest.mark.parametrize("zipped", FORMS)
def test_names_that_are_no_texts_are_left_out(tmp_path: Path, zipped: bool) -> None:
    content = {0: torch.ones(1), (1, 2): torch.ones(1), "a": torch.ones(2), "b": 5}
    assert list(opened(tmp_path / "a.pt", content, zipped).tensors) == ["a"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_sets_beside_the_weights_are_passed_over(tmp_path: Path, protocol: int) -> None:
    content = {"module": {"a": torch.ones(2)}, "sparse_tensor_module_names": set(), "b": {1, "c"}}
    assert list(opened(tmp_path / "a.pt", content, protocol=protocol).tensors) == ["a"]


def test_settings_beside_the_weights_are_passed_over(tmp_path: Path) -> None:
    content = {
        "module": {"a": torch.ones(2)},
        "settings": {"size": torch.Size([2]), "device": torch.device("cpu"), "ids": {1, 2}},
        "dtype": torch.float16,
    }
    assert list(opened(tmp_path / "a.pt", content).tensors) == ["a"]


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("sparse", torch.eye(32, 48).to_sparse()),
        ("meta", torch.empty(32, 48, device="meta")),
        ("expanded", torch.ones(1).expand(32, 48)),
        ("quantised", torch.quantize_per_tensor(torch.ones(32, 48), 0.1, 0, torch.qint8)),
        ("int64", torch.ones(32, 48, dtype=torch.int64)),
        ("bool", torch.ones(32, 48, dtype=torch.bool)),
        ("complex64", torch.ones(32, 48, dtype=torch.complex64)),
    ],
)
def test_a_tensor_of_another_kind_is_named_where_it_is_used(
    whole: goldens.Tensors, tmp_path: Path, kind: str, tensor: torch.Tensor
) -> None:
    name = f"unet.{next(iter(goldens.LAYERS))}.processor.to_k_ip.weight"
    path = tmp_path / "adapter.pt"
    torch.save(whole | {name: tensor}, path)
    with goldens.refused(path, name, kind):
        load_checkpoint(path)
    torch.save(whole | {"not used": tensor}, path)
    assert load_checkpoint(path).num_tokens == 16


def test_a_compressed_archive_is_refused_without_unpacking_it(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(100_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with goldens.refused(packed, "compressed", "torch.save"):
        open_weight_file(packed)


@pytest.mark.parametrize("sized", [0, 10**9])
def test_a_storage_that_is_smaller_than_its_tensor_is_refused(tmp_path: Path, sized: int) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(4, 4)}, path)
    content = path.read_bytes()
    place = content.index(b"K\x10")  # the storage's 16 numbers
    assert content.count(b"K\x10") == 1
    path.write_bytes(content[:place] + b"J" + sized.to_bytes(4, "little") + content[place + 2 :])
    with goldens.refused(path, "cannot be read as a PyTorch file"):
        open_weight_file(path)


def written(instructions: bytes) -> bytes:
    """An archive as of torch.save, with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", instructions)
    return file.getvalue()


@pytest.mark.parametrize(
    "instructions",
    [
        b"\x80\x02" + b"}" * (MAX_INDEX + 1),
        b"\x80\x02" + b"(" * (MAX_INDEX - 3) + b".",
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little"),  # a buffer of a terabyte
        b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
        b"\x80\x02p" + b"9" * 4000 + b"\n.",
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02c" + b"torch\nFloatStorage\n(K\x01K\x02u.",
    ],
)
def test_what_no_torch_writes_ends_in_a_sentence(tmp_path: Path, instructions: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(written(instructions))
    with goldens.refused(path):
        open_weight_file(path)


def test_keys_that_collide_do_not_hang(tmp_path: Path) -> None:
    """Whole numbers can be chosen so that a dict of a hundred thousand takes minutes to fill."""
    collide = 2**61 - 1
    content = pickle.dumps({n * collide: None for n in range(3)}, 2)
    assert b"\x8a" in content  # LONG1
    keys = (b"\x8a\x0a" + (n * collide).to_bytes(10, "little") + b"N" for n in range(100_000))
    path = tmp_path / "a.pt"
    path.write_bytes(written(b"\x80\x02}(" + b"".join(keys) + b"u."))
    assert not open_weight_file(path).tensors
