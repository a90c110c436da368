"""Files, JSON, YAML and values from outside: what is wrong is said, and nothing hangs."""

import json
import math
import os
import time

import numpy as np
import pytest
import torch

from easyref_core.errors import EasyRefError
from easyref_core.untrusted import (
    MAX_DEPTH,
    escaped,
    flag,
    inside,
    is_regular,
    number,
    open_regular,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_lines,
    shown,
    text,
    whole_number,
)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    start = time.monotonic()
    with pytest.raises(EasyRefError, match="pipe or a device"), open_regular(pipe):
        pass
    assert not is_regular(pipe)
    assert time.monotonic() - start < 1


def test_a_device_that_never_ends_is_refused():
    with pytest.raises(EasyRefError, match="pipe or a device"):
        read_bytes("/dev/zero")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "There is no file"),
        (".", "is a folder"),
        ("a" * 5000, "cannot be read"),
        ("zero\0byte", "cannot be read"),
        ("circle", "cannot be read"),
        ("file/below", "There is no file"),
    ],
)
def test_what_is_no_file_is_named(tmp_path, name, message):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    assert not is_regular(tmp_path / name)
    with pytest.raises(EasyRefError, match=message):
        read_bytes(tmp_path / name)


def test_a_file_larger_than_its_kind_is_not_read_whole(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as content:
        content.truncate(20_000_000_000)
    start = time.monotonic()
    with pytest.raises(EasyRefError, match="larger than the 4,000,000 bytes"):
        read_json(file)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_json_of_a_hundred_thousand_levels_is_refused(brackets):
    opening = "[" if brackets == "[]" else '{"a":'
    content = opening * 100_000 + "1" + brackets[1] * 100_000
    with pytest.raises(EasyRefError, match="nested more than"):
        parse_json(content, "config.json")


def test_brackets_within_texts_are_no_levels():
    value = {"a": "[" * 1000, 'b"\\': '\\"' + "{" * 1000, "c": "\\"}
    assert parse_json(json.dumps(value), "x") == value


def test_json_up_to_the_limit_is_read():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b'"' + b"[" * 5000, b"9" * 5000])
def test_what_is_not_json_is_named(content):
    with pytest.raises(EasyRefError, match=r"config\.json"):
        parse_json(content, "config.json")


def test_json_with_a_byte_order_mark_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}


@pytest.mark.parametrize(
    "content",
    [
        "a: [" * 5000,
        "- " * 50_000,
        "a: &a [*a]",
        "a: &a [x,x]\n"
        + "".join(
            f"{c}: &{c} [*{p},*{p}]\n"
            for p, c in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
        ),
        "!!python/object/apply:os.system [true]",
        "a: b: c",
    ],
    ids=["deep", "deep list", "within itself", "doubling", "program", "no yaml"],
)
def test_yaml_that_nothing_could_hold_is_refused(content):
    start = time.monotonic()
    with pytest.raises(EasyRefError, match="is not YAML"):
        parse_yaml(content, "recipe.yaml")
    assert time.monotonic() - start < 5


def test_yaml_may_refer_to_what_it_said_before():
    assert parse_yaml("a: &a {x: 1}\nb: *a", "x") == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../secret", "link", "", 3, None, "..\\secret", "a\0b"],
)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(EasyRefError, match=r"outside the folder|file name is needed"):
        inside(folder, name)


def test_links_of_hugging_faces_cache_lead_to_its_own_store(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--a--b" / "blobs" / "4567"
    blob.parent.mkdir()
    blob.touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/4567")
    assert inside(snapshot, "model.safetensors").is_file()
    download = tmp_path / "Qwen2-VL"  # older downloads to a folder hold links to the cache
    download.mkdir()
    (download / "model.safetensors").symlink_to(blob)
    assert inside(download, "model.safetensors").is_file()


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, True, "1", None, [1], 3.5, 10**400, 1j, torch.ones(2)]
)
def test_what_is_no_number_of_the_range_is_refused(value):
    with pytest.raises(EasyRefError, match=r"weight is .*; it must be a number from -1 to 3"):
        number(value, "weight", -1, 3)


@pytest.mark.parametrize(
    "value", [1, 1.0, np.float32(1), np.float64(1), np.int64(1), torch.tensor(1.0), torch.tensor(1)]
)
def test_numbers_of_other_libraries_are_read(value):
    found = number(value, "weight"), whole_number(value, "count")
    assert found == (1.0, 1)
    assert [type(n) for n in found] == [float, int]


@pytest.mark.parametrize("value", [1.5, math.nan, -1, 10, True, "1", None])
def test_what_is_no_whole_number_of_the_range_is_refused(value):
    with pytest.raises(EasyRefError, match="must be a whole number from 0 to 9"):
        whole_number(value, "count", 0, 9)


def test_texts_and_flags_are_not_guessed():
    assert text("a", "prompt") == "a"
    assert flag(False, "square") is False
    with pytest.raises(EasyRefError, match="prompt is 3; it must be a text"):
        text(3, "prompt")
    with pytest.raises(EasyRefError, match="square is 0; it must be true or false"):
        flag(0, "square")


def test_control_characters_of_a_name_are_written_out():
    assert escaped("\x1b[2J\nü\ud800\u202e") == "\\x1b[2J\\nü\\ud800\\u202e"
    assert shown("a\rb") == "'a\\rb'"
    assert len(shown("x" * 10**6)) <= 60
    assert shown(10**5000) == "a very large number"


@pytest.mark.parametrize("line_break", [b"\n", b"\r"])
def test_a_file_of_too_many_lines_is_refused(tmp_path, line_break):
    file = tmp_path / "lines"
    file.write_bytes(b"a" + line_break + b"b")
    assert read_lines(file) == [b"a", b"b"]
    file.write_bytes(line_break * 1_000_001)
    with pytest.raises(EasyRefError, match="more than the 1,000,000 lines"):
        read_lines(file)
