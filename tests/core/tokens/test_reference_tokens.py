"""Reference tokens are checked when they are made, and a file brings them back bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import goldens
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from easyref_core.adapter.checkpoint import AdapterCheckpoint
from easyref_core.adapter.key_values import check_tokens
from easyref_core.tokens import reference_tokens
from easyref_core.tokens.reference_tokens import (
    FORMAT,
    FORMAT_VERSION,
    ReferenceTokens,
    describe,
    load_tokens,
    save_tokens,
    stack_tokens,
)


def tokens(seed: int = 0, shape: tuple[int, ...] = (1, 16, 96), **changes: Any) -> ReferenceTokens:
    generator = torch.Generator().manual_seed(seed)
    made = ReferenceTokens(
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        adapter="0123456789abcdef",
        adapter_name="easyref.safetensors",
        prompt='a "red" cube,\n戴帽的女孩 🎩',
        num_references=4,
        aggregation="average",
    )
    return replace(made, **changes)


@pytest.mark.parametrize("shape", [(1, 16, 96), (3, 64, 32)])
def test_a_file_brings_everything_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    made = tokens(shape=shape)
    path = save_tokens(made, tmp_path / "deep" / "down" / "tokens.safetensors")
    found = load_tokens(path)
    for field in fields(ReferenceTokens):
        value = getattr(made, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, field.name), value)
        else:
            assert getattr(found, field.name) == value
    assert (found.batch, found.num_tokens, found.width) == shape


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = save_tokens(tokens(), tmp_path / "tokens.safetensors")
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["cond", "uncond"]
        metadata = file.metadata()
    assert metadata.pop("prompt") == tokens().prompt
    assert metadata == {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "adapter": "0123456789abcdef",
        "adapter_name": "easyref.safetensors",
        "num_references": "4",
        "aggregation": "average",
    }


def test_loaded_tokens_do_not_change_with_their_file(tmp_path: Path) -> None:
    made, other = tokens(0), tokens(1)
    path = save_tokens(made, tmp_path / "tokens.safetensors")
    found = load_tokens(path)
    with path.open("r+b") as file:  # in place, as a copy over it would
        file.write(save_tokens(other, tmp_path / "other.safetensors").read_bytes())
    assert torch.equal(load_tokens(path).cond, other.cond)
    assert torch.equal(found.cond, made.cond)
    assert torch.equal(found.uncond, made.uncond)


def test_tensors_that_are_views_can_be_saved(tmp_path: Path) -> None:
    wide = torch.randn(1, 96, 32)
    made = tokens(cond=wide.transpose(1, 2), uncond=wide.transpose(1, 2))
    assert torch.equal(load_tokens(save_tokens(made, tmp_path / "t.safetensors")).cond, made.cond)


def test_one_tensor_that_serves_as_both_can_be_saved(tmp_path: Path) -> None:
    both = torch.randn(1, 16, 96)
    found = load_tokens(save_tokens(tokens(cond=both, uncond=both), tmp_path / "t.safetensors"))
    assert torch.equal(found.cond, both)
    assert torch.equal(found.uncond, both)


@pytest.mark.parametrize("step", [(os, "replace"), (Path, "write_bytes")], ids=lambda s: s[1])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str]
) -> None:
    path = save_tokens(tokens(0), tmp_path / "tokens.safetensors")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*step, full)
    with goldens.refused(path, "cannot be written", "No space left"):
        save_tokens(tokens(1), path, overwrite=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tokens(tokens(), tmp_path / "tokens.safetensors", overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with goldens.refused(tmp_path / "file", "cannot be written"):
        save_tokens(tokens(), tmp_path / "file" / "tokens.safetensors")


def test_only_tokens_are_replaced_and_only_where_that_was_asked_for(tmp_path: Path) -> None:
    path = save_tokens(tokens(0), tmp_path / "tokens.safetensors")
    with goldens.refused(path, "exists", "--overwrite"):
        save_tokens(tokens(1), path)
    assert torch.equal(load_tokens(path).cond, tokens(0).cond)
    assert save_tokens(tokens(1), path, overwrite=True) == path
    assert torch.equal(load_tokens(path).cond, tokens(1).cond)
    save_file({"cond": torch.zeros(1)}, path)
    with goldens.refused(path, "something else than reference tokens"):
        save_tokens(tokens(1), path, overwrite=True)


@pytest.mark.parametrize("name", ["tokens", "tokens.png", "tokens.safetensors.bak", ".safetensors"])
def test_token_files_have_their_ending(tmp_path: Path, name: str) -> None:
    with goldens.refused(tmp_path / name, f"Name it {name}.safetensors"):
        save_tokens(tokens(), tmp_path / name)
    save_tokens(tokens(), tmp_path / "tokens.SAFETENSORS")
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.SAFETENSORS"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_the_file(tmp_path: Path) -> None:
    path = save_tokens(tokens(), tmp_path / "tokens.safetensors")
    assert path.stat().st_mode & 0o777 == 0o644


def write(path: Path, changes: dict[str, str | None], **tensors: torch.Tensor) -> Path:
    """A tokens file whose metadata were tampered with; None takes an entry out."""
    metadata = {"format": FORMAT, "version": "1", "adapter": "a", "num_references": "1"}
    metadata = {n: v for n, v in (metadata | changes).items() if v is not None}
    content = {"cond": torch.ones(1, 4, 8), "uncond": torch.ones(1, 4, 8)} | tensors
    return goldens.write(path, content, **metadata)


def test_the_helper_writes_a_file_that_loads(tmp_path: Path) -> None:
    assert load_tokens(write(tmp_path / "t", {})).num_tokens == 4


@pytest.mark.parametrize("version", ["2", "17"])
def test_newer_format_asks_for_an_update(tmp_path: Path, version: str) -> None:
    path = write(tmp_path / "t", {"version": version})
    with goldens.refused(path, f"format {version}", "up to 1", "Update"):
        load_tokens(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "new"},
        {"version": "0"},
        {"num_references": "many"},
        {"num_references": "-4"},
        {"num_references": "٣"},
        {"version": "9" * 100},
    ],
)
def test_damaged_header(tmp_path: Path, changes: dict[str, str | None]) -> None:
    path = write(tmp_path / "t", changes)
    with goldens.refused(path, "damaged header"):
        load_tokens(path)


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "complex64"])
def test_tokens_of_another_kind_of_number_are_refused(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    path = tmp_path / "t"
    if dtype == "complex64":  # as this safetensors cannot write it
        header = {n: {"dtype": "C64", "shape": [1, 4, 8]} for n in ("cond", "uncond")}
        for number, entry in enumerate(header.values()):
            entry["data_offsets"] = [256 * number, 256 * number + 256]
        text = json.dumps(header | {"__metadata__": {"format": FORMAT}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(512))
    else:
        write(path, {}, uncond=torch.ones(1, 4, 8, dtype=kind))
    with goldens.refused(path, "cond", dtype):
        load_tokens(path)


@pytest.mark.parametrize("rows", [0, 10**6])
def test_sizes_that_no_tokens_have_are_refused_unread(tmp_path: Path, rows: int) -> None:
    """The large one is 20 GB of zeros that take no room on the disk."""
    size = rows * 2560 * 4
    places = {"cond": [0, size], "uncond": [size, 2 * size]}
    header = {
        n: {"dtype": "F32", "shape": [1, rows, 2560], "data_offsets": p} for n, p in places.items()
    }
    text = json.dumps(header | {"__metadata__": {"format": FORMAT}}).encode()
    path = tmp_path / "t"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 2 * size)
    with goldens.refused(path, "[1, 0, 2560]" if rows == 0 else "20,480,000,000"):
        load_tokens(path)


def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_tokens, "MAX_BYTES", 1000)
    with goldens.refused("12,288 bytes", "1,000"):
        save_tokens(tokens(), tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_in_messages_have_no_control_characters() -> None:
    assert describe(tokens(adapter_name="a\x1b[2J\n")).startswith("a\\x1b[2J\\n (")


def test_foreign_files(tmp_path: Path) -> None:
    for path in (
        goldens.ADAPTER,
        write(tmp_path / "no_format", {"format": None}),
        write(tmp_path / "other_format", {"format": "other"}),
        goldens.write(tmp_path / "only_cond", {"cond": torch.ones(1, 2, 3)}, format=FORMAT),
    ):
        with goldens.refused(path, "does not hold EasyRef reference tokens", "(it holds "):
            load_tokens(path)
    torch.save({"cond": torch.ones(1, 4, 8), "uncond": torch.ones(1, 4, 8)}, tmp_path / "t.pt")
    with goldens.refused("does not hold EasyRef reference tokens"):
        load_tokens(tmp_path / "t.pt")
    with goldens.refused("no weight file", tmp_path / "nothing"):
        load_tokens(tmp_path / "nothing")


def test_truncated_file(tmp_path: Path) -> None:
    path = save_tokens(tokens(), tmp_path / "tokens.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with goldens.refused(path, "not a whole safetensors file"):
        load_tokens(path)


@pytest.mark.parametrize("name", ["cond", "uncond"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_tokens_that_are_no_numbers_are_refused(tmp_path: Path, name: str, value: float) -> None:
    bad = torch.ones(1, 4, 8)
    bad[0, 3, 7] = value
    with goldens.refused(f"'{name}'", "not numbers"):
        tokens(**{"cond": torch.ones(1, 4, 8), "uncond": torch.ones(1, 4, 8), name: bad})
    path = write(tmp_path / "t", {}, **{name: bad})
    with goldens.refused(path, f"'{name}'", "not numbers"):
        load_tokens(path)


@pytest.mark.parametrize("shape", [(16, 96), (1, 0, 96), (0, 16, 96), (1, 1, 16, 96), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with goldens.refused("'cond'", list(shape), "[batch, tokens, width]"):
        tokens(cond=torch.ones(shape), uncond=torch.ones(shape))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cond": None}, "'cond' are nothing"),
        ({"uncond": [[1.0]]}, "'uncond' are a list"),
        ({"cond": torch.ones(1, 16, 96, dtype=torch.int32)}, "torch.int32 tensor"),
        ({"cond": torch.ones(1, 16, 96, device="meta")}, "'cond' are"),
        ({"cond": torch.ones(1, 16, 96).to_sparse()}, "'cond' are"),
        ({"adapter": None}, "adapter is nothing"),
        ({"prompt": ["a"]}, "prompt is a list"),
        ({"num_references": -1}, "num_references is -1"),
        ({"num_references": 0.5}, "num_references is 0.5"),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused(changes: dict[str, Any], said: str) -> None:
    with goldens.refused("Reference tokens", said):
        tokens(**changes)
    with goldens.refused("Group 2 is a Tensor"):
        stack_tokens([tokens(), torch.ones(1)])


def test_cond_and_uncond_of_two_shapes_are_refused() -> None:
    with goldens.refused("[1, 16, 96]", "[1, 32, 96]"):
        tokens(uncond=torch.ones(1, 32, 96))


def test_stack_puts_groups_into_one_batch() -> None:
    first, second = tokens(0, prompt="one"), tokens(1, (2, 16, 96), prompt="two")
    found = stack_tokens([first, second])
    assert torch.equal(found.cond, torch.cat((first.cond, second.cond)))
    assert torch.equal(found.uncond, torch.cat((first.uncond, second.uncond)))
    assert (found.batch, found.num_references, found.prompt) == (3, 8, "one | two")
    assert (found.adapter, found.aggregation) == (first.adapter, first.aggregation)
    assert first.batch == 1


def test_stack_names_both_sides_where_groups_do_not_fit() -> None:
    first = tokens()
    for other in (
        tokens(adapter="fedcba9876543210", adapter_name="other.safetensors"),
        tokens(shape=(1, 32, 96), adapter_name=""),
        tokens(shape=(1, 16, 48)),
    ):
        with goldens.refused(describe(first), describe(other), "one batch"):
            stack_tokens([first, other])
    with goldens.refused("no reference tokens"):
        stack_tokens([])


def test_description_names_adapter_and_size() -> None:
    assert describe(tokens()) == "easyref.safetensors (0123456789abcdef, 16 tokens of width 96)"
    assert describe(tokens(adapter_name="")).startswith("an unnamed adapter (")


def test_tokens_belong_to_their_adapter(checkpoint: AdapterCheckpoint) -> None:
    own = checkpoint.identity
    check_tokens(checkpoint, tokens(adapter=own))
    check_tokens(checkpoint, tokens(shape=(2, 48, 96), adapter=own))  # three concatenated
    for other in (
        tokens(),
        tokens(shape=(1, 16, 2048), adapter=own),
        tokens(shape=(1, 20, 96), adapter=own),
    ):
        with goldens.refused(describe(other), f"easyref.safetensors ({own}, 16 tokens"):
            check_tokens(checkpoint, other)
