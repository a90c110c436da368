"""What can be chosen is listed whatever lies in the folders: nothing raises, nothing waits."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyhost import GOLDEN, GOLDEN_MLLM, Pack
from goldens import MLLM


@pytest.fixture
def put(pack: Pack) -> Iterator[Callable[[str], Path]]:
    """A new folder of a kind; it is removed after the test."""
    made: list[Path] = []

    def make(kind: str) -> Path:
        folder = pack.base / "models" / kind / "odd"
        folder.mkdir(parents=True)
        made.append(folder)
        return folder

    yield make
    for folder in made:
        os.chmod(folder, 0o700)
        shutil.rmtree(folder)


def choices(pack: Pack, node: str = "EasyRefLoader") -> dict[str, list[str]]:
    start = time.monotonic()
    inputs = pack.nodes[node].define_schema().inputs
    assert time.monotonic() - start < 2
    return {i.id: i.options for i in inputs}


def check_that_others_are_listed(pack: Pack) -> None:
    listed = choices(pack)
    assert GOLDEN_MLLM in listed["mllm"]
    assert GOLDEN in listed["adapter"]
    assert not [name for name in listed["mllm"] if name.startswith("odd")]


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"model_type": ' * 100_000,
        b'{"model_type": "qwen2_vl"' + b" " * 2_000_000 + b"}",
        b'{"model_type": ["qwen2_vl"]}',
        b"\xff\xfe\x00",
        b"",
        b"[]",
        b"1" * 5000,
    ],
    ids=["nested", "nested objects", "huge", "a list", "no text", "empty", "no object", "a number"],
)
def test_an_odd_config_hides_no_other_mllm(pack: Pack, put: Any, content: bytes) -> None:
    (put("LLM") / "config.json").write_bytes(content)
    check_that_others_are_listed(pack)


@pytest.mark.parametrize("name", ["config.json", "odd.safetensors"])
def test_a_pipe_is_neither_listed_nor_waited_for(pack: Pack, put: Any, name: str) -> None:
    for kind in ("LLM", "easyref", "easyref_tokens"):
        os.mkfifo(put(kind) / name)
    check_that_others_are_listed(pack)
    assert f"odd/{name}" not in choices(pack)["adapter"]
    assert f"odd/{name}" not in choices(pack, "EasyRefLoadTokens")["file"]


def test_links_in_circles_end(pack: Pack, put: Any) -> None:
    for kind in ("LLM", "easyref", "easyref_tokens"):
        folder = put(kind)
        for name in ("a", "b", "c"):
            (folder / name).symlink_to(folder)
        (folder / "itself.safetensors").symlink_to("itself.safetensors")
        (folder / "itself").symlink_to("itself")
        (folder / "deep").symlink_to(pack.base / "models")
    check_that_others_are_listed(pack)
    assert "odd/itself.safetensors" not in choices(pack)["adapter"]
    choices(pack, "EasyRefLoadTokens")


def test_linked_folders_and_files_are_listed(pack: Pack, put: Any, tmp_path: Path) -> None:
    shutil.copytree(MLLM, tmp_path / "elsewhere")
    (put("LLM").parent / "linked").symlink_to(tmp_path / "elsewhere")
    folder = put("easyref")
    (folder / "there").symlink_to(tmp_path / "elsewhere")
    assert "linked" in choices(pack)["mllm"]
    assert "odd/there/model.safetensors" in choices(pack)["adapter"]
    (pack.base / "models" / "LLM" / "linked").unlink()


def test_shards_are_one_choice_their_index(pack: Pack, put: Any) -> None:
    folder = put("easyref")
    convert = pack.part("easyref_core.adapter.convert").convert_adapter
    load = pack.part("easyref_core.adapter.checkpoint").load_checkpoint
    golden = pack.base / "models" / "easyref" / GOLDEN
    index = convert(load(golden), folder / "a.safetensors", max_shard_size="500KB")
    (folder / "b-00001-of-00002.safetensors").touch()  # without an index
    (folder / "config.json").touch()
    listed = [name for name in choices(pack)["adapter"] if name.startswith("odd/")]
    assert listed == [f"odd/{index.name}", "odd/b-00001-of-00002.safetensors"]
    given = {"adapter": listed[0], "mllm": GOLDEN_MLLM, "precision": "fp32"}
    easyref = pack.run("EasyRefLoader", **given)
    assert easyref.checkpoint.identity == load(golden).identity
    fingerprint = pack.nodes["EasyRefLoader"].fingerprint_inputs
    first = fingerprint(**given)
    assert fingerprint(**given) == first
    os.utime(next(folder.glob("a-00002-of-*")), ns=(1, 1))
    assert fingerprint(**given) != first


def test_a_folder_that_cannot_be_read_hides_no_other(
    pack: Pack, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, scandir = put("LLM"), os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    check_that_others_are_listed(pack)


def test_names_with_control_characters_are_listed(pack: Pack, put: Any) -> None:
    (put("easyref") / "a\n\x1b[2J.safetensors").touch()
    listed = choices(pack)["adapter"]
    assert "odd/a\n\x1b[2J.safetensors" in listed
    json.dumps(listed)
    with pack.refused("gone\\n\\x1b[2J"):
        pack.run("EasyRefLoader", "gone\n\x1b[2J", GOLDEN_MLLM, "auto")


def test_a_folder_of_the_models_that_is_a_file_or_is_gone_hides_nothing(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    (tmp_path / "file").touch()
    for kind in ("LLM", "easyref", "easyref_tokens"):
        paths, endings = folder_paths.folder_names_and_paths[kind]
        more = [str(tmp_path / "gone"), str(tmp_path / "file"), *paths]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (more, endings))
    check_that_others_are_listed(pack)
    choices(pack, "EasyRefLoadTokens")
