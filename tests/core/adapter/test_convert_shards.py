"""`easyref convert --max-shard-size`: an adapter in several files with an index, and back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from goldens import ADAPTER, MLLM
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file

from easyref_core import files
from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.adapter.convert import convert_adapter
from easyref_core.cli import main
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.evaluation.identity import file_identity

INDEX = "a.safetensors.index.json"
SIZE = "300KB"


def convert(to: Path, source: Path = ADAPTER, dtype: str | None = None, **options: Any) -> Path:
    return convert_adapter(load_checkpoint(source), to, dtype, **options)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the golden adapter in shards."""
    folder = tmp_path_factory.mktemp("shards")
    return convert(folder / "a.safetensors", max_shard_size=SIZE)


@pytest.fixture
def index(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(made.parent, tmp_path / "copy") / made.name


def shards_of(index: Path) -> list[Path]:
    return sorted(index.parent.glob("*-of-*.safetensors"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_are_those_that_hugging_face_writes(made: Path, tmp_path: Path) -> None:
    whole = load_file(convert(tmp_path / "a.safetensors"))
    found = json.loads(made.read_text())
    pattern = "a{suffix}.safetensors"
    wanted = split_torch_state_dict_into_shards(
        {n: whole[n] for n in found["weight_map"]}, filename_pattern=pattern, max_shard_size=SIZE
    )
    assert found == {
        "metadata": {"total_size": sum(t.nbytes for t in whole.values())},
        "weight_map": wanted.tensor_to_filename,
    }
    assert len(wanted.filename_to_tensors) > 3
    assert {p.name for p in shards_of(made)} == wanted.filename_to_tensors.keys()
    assert len(os.listdir(made.parent)) == len(wanted.filename_to_tensors) + 1
    for name, names in wanted.filename_to_tensors.items():
        tensors = load_file(made.with_name(name))
        assert tensors.keys() == set(names)
        assert all(torch.equal(t, whole[n]) for n, t in tensors.items())


@pytest.mark.parametrize("dtype", [None, "fp8", "int8"])
def test_shards_become_the_same_file_again(tmp_path: Path, dtype: str | None) -> None:
    source = goldens.write(tmp_path / "s.safetensors", goldens.adapter_tensors(), image_size="112")
    whole = convert(tmp_path / "whole.safetensors", source, dtype)
    index = convert(tmp_path / "a.safetensors", source, dtype, max_shard_size=100_000)
    again = convert(tmp_path / "again.safetensors", index)
    assert again.read_bytes() == whole.read_bytes()
    with safe_open(again, "pt") as file:
        assert file.metadata() == {"format": "pt", "image_size": "112"}
    found, wanted = load_checkpoint(index), load_checkpoint(whole)
    assert found.image_size == 112
    assert (found.identity, found.lora_identity) == (wanted.identity, wanted.lora_identity)
    states = [plan_encoder(c, MLLM).build().state_dict() for c in (found, wanted)]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def test_shards_can_be_divided_anew(made: Path, tmp_path: Path) -> None:
    other = convert(tmp_path / "b.safetensors", made, max_shard_size="1MB")
    assert len(shards_of(other)) < len(shards_of(made))
    wanted = convert(tmp_path / "whole.safetensors").read_bytes()
    assert convert(tmp_path / "again.safetensors", other).read_bytes() == wanted


@pytest.mark.parametrize("size", ["1GB", "0.5 gb", 10**9, "1000000000"])
def test_what_is_small_enough_is_one_file(tmp_path: Path, size: int | str) -> None:
    path = tmp_path / "a.safetensors"
    assert convert(path, max_shard_size=size) == path
    assert os.listdir(tmp_path) == [path.name]


def test_other_peoples_shards_are_read(tmp_path: Path) -> None:
    save_torch_state_dict(
        goldens.adapter_tensors(),
        tmp_path,
        filename_pattern="a{suffix}.safetensors",
        max_shard_size=SIZE,
    )
    assert load_checkpoint(tmp_path / INDEX).identity == load_checkpoint(ADAPTER).identity


def saved_by_hugging_face(folder: Path, metadata: dict[str, Any]) -> Path:
    """The index of what huggingface_hub makes of the golden adapter with layer pooling."""
    save_torch_state_dict(
        goldens.pooled_adapter("dla"),
        folder,
        filename_pattern="a{suffix}.safetensors",
        max_shard_size=SIZE,
        metadata=metadata,
    )
    return folder / INDEX


def test_settings_in_other_peoples_index_are_those_of_the_adapter(tmp_path: Path) -> None:
    """huggingface_hub writes into the index what it writes into the header of a single file."""
    settings = {"image_size": "112", "mllm_layers": "0,1,2,3"}
    index = saved_by_hugging_face(tmp_path, settings)
    assert json.loads(index.read_text())["metadata"].items() > settings.items()
    with safe_open(shards_of(index)[0], "pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    found = load_checkpoint(index)
    assert (found.image_size, found.mllm_layers) == (112, (0, 1, 2, 3))
    again = load_checkpoint(convert(tmp_path / "whole.safetensors", index))
    assert again.file.metadata == {"format": "pt", **settings}
    assert (again.image_size, again.mllm_layers) == (112, (0, 1, 2, 3))
    assert again.identity == found.identity


def with_metadata(index: Path, metadata: Any) -> None:
    found = json.loads(index.read_text())
    index.write_text(json.dumps(found | {"metadata": metadata}))


@pytest.mark.parametrize("size", [112, "112"])
def test_a_setting_may_be_a_number(index: Path, size: int | str) -> None:
    with_metadata(index, {"image_size": size})
    assert load_checkpoint(index).image_size == 112


@pytest.mark.parametrize("metadata", [{}, None, {"total_size": [], "format": "x"}])
def test_what_an_index_says_of_its_files_is_no_setting(index: Path, metadata: Any) -> None:
    wanted = load_checkpoint(index).file.metadata
    with_metadata(index, metadata)
    assert load_checkpoint(index).file.metadata == wanted == {"format": "pt"}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ([], ("its metadata are a list",)),
        ("112", ("its metadata are a text",)),
        ({"image_size": "7"}, ("image_size '7'", "56")),
        ({"image_size": [112]}, ("image_size '[112]'", "56")),
        ({"image_size": True}, ("image_size 'true'", "56")),
        ({"x": "x" * 100_000}, ("metadata of 100,001 characters",)),
        ({"x": {"\x1b": "x" * 100_000}}, ("metadata of",)),
    ],
)
def test_a_damaged_setting_in_an_index_is_refused(
    index: Path, metadata: Any, said: tuple[str, ...]
) -> None:
    with_metadata(index, metadata)
    with goldens.refused(str(index), *said):
        load_checkpoint(index)


def test_an_index_that_contradicts_its_shards_is_refused(tmp_path: Path) -> None:
    source = goldens.write(tmp_path / "s.safetensors", goldens.adapter_tensors(), image_size="112")
    index = convert(tmp_path / "a.safetensors", source, max_shard_size=SIZE)
    with_metadata(index, {"image_size": "112"})
    assert load_checkpoint(index).image_size == 112
    for name, said in {"image_size": "336", "shards_of": "0"}.items():
        with_metadata(index, {name: said})
        with goldens.refused(str(index), f"'{name}' is '{said}', they say '"):
            load_checkpoint(index)


def test_a_scale_may_lie_in_another_shard_than_its_weight(tmp_path: Path) -> None:
    whole = convert(tmp_path / "whole.safetensors", dtype="fp8")
    tensors = load_file(whole)
    parts = (
        {n: t for n, t in tensors.items() if ("scale" in n) is second} for second in (False, True)
    )
    places = {}
    for number, part in enumerate(parts):
        goldens.write(tmp_path / f"{number}.safetensors", part)
        places |= dict.fromkeys(part, f"{number}.safetensors")
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": places}))
    found, wanted = load_checkpoint(index).file, load_checkpoint(whole).file
    assert found.scales.keys() == wanted.scales.keys()
    names = {name: name for name in wanted.tensors}
    first, second = found.read(names), wanted.read(names)
    assert all(torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize(
    "size",
    ["", "0", 0, -1, "0.1", "GB", "2 gigabytes", "-1GB", "1e9", "nan", "2GiB", True, "9" * 40],
)
def test_what_is_no_size_is_refused(tmp_path: Path, size: Any) -> None:
    with goldens.refused("cannot have the size", "2GB"):
        convert(tmp_path / "a.safetensors", max_shard_size=size)
    assert not os.listdir(tmp_path)


def test_names_and_numbers_of_files_that_nobody_could_use_are_refused(tmp_path: Path) -> None:
    with goldens.refused("files; 100 can be read", "larger"):
        convert(tmp_path / "a.safetensors", max_shard_size="1KB")
    with goldens.refused("a.bin does not", "a.safetensors"):
        convert(tmp_path / "a.bin", max_shard_size=SIZE)
    with goldens.refused(INDEX, "the name of an index"):
        convert(tmp_path / INDEX)
    assert not os.listdir(tmp_path)


def missing(index: Path) -> None:
    shards_of(index)[1].unlink()


def damaged(index: Path) -> None:
    shard = shards_of(index)[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def page(index: Path) -> None:
    shards_of(index)[1].write_text("<!DOCTYPE html>")


def swapped(index: Path) -> None:
    first, second, *_ = shards_of(index)
    shutil.copy(first, second)


def of_another_adapter(index: Path) -> None:
    """Of the same names and shapes."""
    tensors = {n: t * 2 if t.is_floating_point() else t for n, t in load_file(ADAPTER).items()}
    source = goldens.write(index.with_name("other.safetensors"), tensors)
    other = convert(index.parent / "other" / "a.safetensors", source, max_shard_size=SIZE)
    shutil.copy(shards_of(other)[1], index.parent)


def without_a_weight(index: Path) -> None:
    found = json.loads(index.read_text())
    del found["weight_map"]["image_proj_model.proj.0.bias"]
    index.write_text(json.dumps(found))


def with_a_weight_too_many(index: Path) -> None:
    found = json.loads(index.read_text())
    found["weight_map"]["more"] = shards_of(index)[0].name
    index.write_text(json.dumps(found))


def with_text(text: str) -> Callable[[Path], None]:
    return lambda index: index.write_text(text) and None


def leading_to(place: str) -> Callable[[Path], None]:
    def change(index: Path) -> None:
        found = json.loads(index.read_text())
        shutil.copy(ADAPTER, index.parent.parent / "x.safetensors")
        name = place.format(index.parent.parent)
        found["weight_map"] = dict.fromkeys(found["weight_map"], name)
        index.write_text(json.dumps(found))

    return change


SECOND = "a-00002-of-0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (missing, ("lacks 1 of its", SECOND)),
        (damaged, (SECOND, "not a whole safetensors file")),
        (page, (SECOND, "neither a safetensors nor a PyTorch file")),
        (swapped, (SECOND, f"is no shard of {INDEX}", "in it")),
        (of_another_adapter, (SECOND, f"is no shard of {INDEX}", "not written together", "00001")),
        (without_a_weight, ("'image_proj_model.proj.0.bias' is too much in it",)),
        (with_a_weight_too_many, ("'more' is missing in it",)),
        (with_text("{"), (INDEX, "cannot be read as JSON")),
        (with_text("[]"), (INDEX, "weight_map")),
        (with_text('{"weight_map": {"a": 3}}'), ("a file name is needed",)),
        (with_text('{"weight_map": {"a": "a.safetensors.index.json"}}'), (INDEX, "neither")),
        (leading_to("../x.safetensors"), ("outside the folder",)),
        (leading_to("{}/x.safetensors"), ("outside the folder",)),
        (leading_to("..\\x.safetensors"), ("outside the folder",)),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    index: Path, change: Callable[[Path], None], said: tuple[str, ...], capsys: Any
) -> None:
    change(index)
    with goldens.refused(*said):
        load_checkpoint(index)
    before = content(index.parent) if change is missing else None
    for arguments in (["inspect"], ["convert", "--out", str(index.with_name("b.safetensors"))]):
        assert main([arguments[0], str(index), *arguments[1:]]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith("easyref: ")
        assert printed.count("\n") == 1
    assert before is None or content(index.parent) == before


def test_an_index_of_too_many_files_is_refused(tmp_path: Path) -> None:
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(101)}}))
    with goldens.refused("names 101 weight files"):
        load_checkpoint(index)


def test_one_shard_alone_leads_to_its_index(made: Path) -> None:
    for shard in shards_of(made):
        with goldens.refused(shard, "one shard of an adapter", ".safetensors.index.json"):
            load_checkpoint(shard)


def test_a_shard_that_changes_is_noticed(index: Path) -> None:
    file, identity = load_checkpoint(index).file, file_identity(index)
    assert file_identity(index) == identity
    shard = shards_of(index)[-1]
    replaced = bytearray(shard.read_bytes())
    replaced[-1] ^= 1
    shard.write_bytes(replaced)
    for action in (file.check_unchanged, lambda: file.read({"a": next(iter(file.tensors))})):
        with goldens.refused(shard, "has changed since it was loaded"):
            action()
    assert load_checkpoint(index).file.stamp != file.stamp
    assert file_identity(index)["digest"] != identity["digest"]


def test_shards_are_replaced_together_and_only_where_that_was_asked_for(index: Path) -> None:
    to, before = index.with_name("a.safetensors"), content(index.parent)
    with goldens.refused(index, "--overwrite"):
        convert(to, dtype="bfloat16", max_shard_size=SIZE)
    assert content(index.parent) == before
    convert(to, dtype="bfloat16", max_shard_size=SIZE, overwrite=True)
    assert load_checkpoint(index).dtype == "bfloat16"
    left = {path.name for path in shards_of(index)}
    assert left == set(json.loads(index.read_text())["weight_map"].values())
    assert len(left) < len(before) - 1


def test_without_their_index_shards_are_replaced_like_it(index: Path) -> None:
    to = index.with_name("a.safetensors")
    index.unlink()
    with goldens.refused("a-00001-of-0", "--overwrite"):
        convert(to, max_shard_size=SIZE)
    convert(to, max_shard_size=SIZE, overwrite=True)
    load_checkpoint(index)


def test_nothing_else_is_ever_replaced(index: Path) -> None:
    to, shards = index.with_name("a.safetensors"), shards_of(index)
    options = {"max_shard_size": SIZE, "overwrite": True}
    with goldens.refused("which is read"):
        convert(to, index, **options)
    index.unlink()
    shards[1].write_text("notes")
    before = content(index.parent)
    with goldens.refused(shards[1], "something else than a shard"):
        convert(to, **options)
    index.write_text("notes")
    with goldens.refused(index, "something else than an EasyRef adapter"):
        convert(to, **options)
    index.unlink()
    assert content(index.parent) == before


def test_where_one_file_cannot_be_moved_all_is_as_before(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as on Windows, while another program reads it."""
    before, move = content(index.parent), files._move_to_new
    moved: list[Path] = []

    def fail(source: Path, path: Path) -> None:
        if path == index:
            raise PermissionError(13, "Permission denied", str(path))
        move(source, path)
        moved.append(path)

    monkeypatch.setattr(files, "_move_to_new", fail)
    with goldens.refused(index, "Permission denied"):
        convert(index.with_name("a.safetensors"), max_shard_size=SIZE, overwrite=True)
    assert moved == shards_of(index)
    assert content(index.parent) == before


def test_a_weight_that_overflows_leaves_nothing(tmp_path: Path) -> None:
    tensors = goldens.adapter_tensors()
    name = next(n for n in tensors if n.endswith("to_v_ip.weight"))
    tensors[name][0, 0] = 1e6
    source = goldens.write(tmp_path / "source.safetensors", tensors)
    with goldens.refused(name, "overflows in float16"):
        convert(tmp_path / "a.safetensors", source, "float16", max_shard_size=SIZE)
    assert os.listdir(tmp_path) == [source.name]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    arguments = ["convert", str(ADAPTER), "--max-shard-size", SIZE, "--out", str(shards)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / INDEX}\n"
    assert main(["inspect", "--json", str(tmp_path / INDEX)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identity"] == load_checkpoint(ADAPTER).identity
    assert found["bytes"] == sum(path.stat().st_size for path in shards_of(tmp_path / INDEX))
    assert main(["convert", str(tmp_path / INDEX), "--out", str(whole)]) == 0
    assert whole.read_bytes() == convert(tmp_path / "b.safetensors").read_bytes()
