"""Files are written whole or not at all, and nothing that is needed is replaced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from easyref_core import files
from easyref_core.errors import EasyRefError
from easyref_core.files import (
    check_output,
    check_place,
    new_name,
    sweep,
    sync_tree,
    write_atomically,
    write_together,
)


def text(content: str) -> Callable[[Path], int]:
    return lambda path: path.write_text(content)


def test_only_the_file_itself_remains(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "file"
    write_atomically(path, text("first"))
    write_atomically(path, text("second"))
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    parts, index, other = (
        [tmp_path / "new" / n for n in ("1", "2")],
        *(tmp_path / "new" / n for n in ("index", "other")),
    )
    write_together({path: text("first") for path in (*parts, index)})
    old = [index, *parts]

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_together({parts[0]: text("second"), index: fail}, old)
    other.write_text("another's")
    with pytest.raises(FileExistsError):
        write_together({parts[0]: text("second"), other: text("x"), index: text("second")}, old)
    assert [path.read_text() for path in old] == ["first"] * 3
    other.unlink()
    write_together({parts[0]: text("second"), index: text("second")}, old)
    assert sorted(os.listdir(index.parent)) == ["1", "index"]
    assert index.read_text() == parts[0].read_text() == "second"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_process_killed_between_two_files_leaves_no_index(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from easyref_core import files\n"
        "def move(source, path):\n"
        "    if path.name == 'index': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    os.rename(source, path)\n"
        "part, index = (Path(sys.argv[1]) / name for name in ('part', 'index'))\n"
        "writers = {path: lambda new: new.write_text('x') for path in (part, index)}\n"
        "files.write_together(writers)\n"
        "files._move_to_new = move\n"
        "files.write_together(writers, [index, part])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert not (tmp_path / "index").exists()
    assert (tmp_path / "part").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_what_a_library_wrote_for_its_owner_only(tmp_path: Path) -> None:
    def private(path: Path) -> None:
        path.write_text("content")
        path.chmod(0o600)

    write_atomically(tmp_path / "file", private)
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_in_between_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/no/hard/links"))
    path = tmp_path / "file"

    def slowly(partial: Path) -> None:
        partial.write_text("mine")
        path.write_text("another's")

    with pytest.raises(FileExistsError):
        write_atomically(path, slowly, replace=False)
    assert path.read_text() == "another's"
    write_atomically(tmp_path / "other", text("mine"), replace=False)
    assert (tmp_path / "other").read_text() == "mine"


def test_content_is_on_the_disk_before_its_name_and_the_name_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        number = os.fstat(descriptor).st_ino
        names = {p.stat().st_ino: p.name for p in (tmp_path, *tmp_path.rglob("*"))}
        done.append(("sync", names[number]))

    def noted_replace(source: Any, target: Any) -> None:
        replace(source, target)
        done.append(("rename", Path(target).name))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "new" / "file", text("content"))
    assert done == [
        ("sync", tmp_path.name),  # which has the new folder
        ("sync", "content"),
        ("rename", "file"),
        ("sync", "new"),
    ]
    done.clear()
    sync_tree(tmp_path)
    assert done == [("sync", tmp_path.name), ("sync", "file"), ("sync", "new")]


@pytest.mark.skipif(os.name != "posix", reason="locks of files")
def test_what_a_killed_process_left_is_swept_and_what_one_writes_is_not(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from easyref_core.files import write_atomically\n"
        "def write(path):\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_atomically(Path({str(tmp_path / 'file')!r}), write)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    (left,) = os.listdir(tmp_path)
    others = [".file.part", ".easyref-notes.part", left.replace(".part", "")]
    for name in others:
        (tmp_path / name).mkdir()

    def write(path: Path) -> None:
        path.write_text("whole")
        sweep(tmp_path)

    write_atomically(tmp_path / "file", write)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "file"])
    assert (tmp_path / "file").read_text() == "whole"
    sweep(tmp_path / "nowhere")


def test_without_locks_only_old_remains_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_lock", lambda file: False)
    folders = [tmp_path / f".easyref-{n:032x}.part" for n in range(3)]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "lock").touch()
    os.utime(folders[0], (1, 1))
    os.utime(folders[1], (1, 1))
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [folders[2].name]


def is_text(path: Path) -> bool:
    return path.read_bytes().isascii()


def refused(path: Path, said: str, *inputs: Path, overwrite: bool = False) -> None:
    with pytest.raises(EasyRefError, match=re.escape(said)):
        check_output(path, "plain text", is_text, inputs, overwrite)


def test_an_existing_file_is_replaced_only_where_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    check_output(path, "plain text", is_text)
    path.write_text("old")
    refused(path, "exists. Choose another name, or add --overwrite")
    check_output(path, "plain text", is_text, overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_files_of_another_kind_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xff")
    refused(path, "holds something else than plain text", overwrite=overwrite)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "link", "holds something else", overwrite=overwrite)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "holds something else", overwrite=overwrite)
    refused(tmp_path, "cannot be written", overwrite=overwrite)


def test_inputs_are_never_replaced_under_whatever_name(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    path.write_text("old")
    folder.mkdir()
    os.link(path, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(path)
    (tmp_path / "away").symlink_to(folder)
    for name in ("file", "hard", "soft", "folder/../file"):
        refused(tmp_path / name, "which is read", path, overwrite=True)
    for name in ("folder/new", "away/new", "away/deep/new"):
        refused(tmp_path / name, "which is read", folder, overwrite=True)
    check_output(tmp_path / "folder.new", "plain text", is_text, [folder, tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("a" * 300, "too long"), ("a\0b", "Invalid argument"), ("file/new", "Not a directory")],
)
def test_impossible_names_are_refused_in_words(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EasyRefError, match=f"cannot be written.*{said}"):
        check_place(tmp_path / name)


def test_a_new_name_has_the_first_free_number(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    assert new_name(path) == path
    path.touch()
    (tmp_path / "file_1.txt").symlink_to(tmp_path / "nowhere")
    assert new_name(path) == tmp_path / "file_2.txt"
