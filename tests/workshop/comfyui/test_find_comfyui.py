"""Which ComfyUI is used: the one named, the one around the pack, the one comfy-cli installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from workshop.comfyui import find_comfyui as finder


def make_comfyui(folder: Path, version: str = "1.2.3") -> Path:
    """The files by which ComfyUI's source is recognised."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "model_patcher.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    return folder.resolve()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, no COMFYUI_PATH, and a pack outside of any ComfyUI."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(finder, "PACK", tmp_path / "pack")
    return tmp_path


def test_nothing_is_found_where_there_is_nothing(home: Path) -> None:
    assert finder.find_comfyui() is None


def test_comfy_clis_workspace_is_found(home: Path) -> None:
    assert finder.find_comfyui() is None
    made = make_comfyui(finder.workspace())
    assert finder.find_comfyui() == made
    assert made.is_relative_to(home.resolve())


def test_of_several_beside_the_workspace_the_newest_is_found(home: Path) -> None:
    own = make_comfyui(finder.workspace(), "0.9.2")
    make_comfyui(own.with_name("ComfyUI-oldest"), "0.8.0")
    make_comfyui(own.with_name("a-copy"), "0.9.2")
    assert finder.find_comfyui() == own
    newest = make_comfyui(own.with_name("ComfyUI-next"), "0.33.0")
    own.with_name("notes").mkdir()
    assert finder.find_comfyui() == newest


def test_a_pack_inside_comfyui_uses_that_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comfyui(finder.workspace())
    around = make_comfyui(home / "portable")
    monkeypatch.setattr(finder, "PACK", around / "custom_nodes" / "easyref")
    assert finder.find_comfyui() == around


def test_comfyui_path_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_comfyui(finder.workspace())
    around = make_comfyui(home / "portable")
    monkeypatch.setattr(finder, "PACK", around / "custom_nodes" / "easyref")
    chosen = make_comfyui(home / "chosen")
    monkeypatch.setenv("COMFYUI_PATH", str(chosen))
    assert finder.find_comfyui() == chosen


@pytest.mark.parametrize("make", [False, True])
def test_a_wrong_comfyui_path_finds_nothing_else(
    home: Path, monkeypatch: pytest.MonkeyPatch, make: bool
) -> None:
    make_comfyui(finder.workspace())
    wrong = home / "wrong"
    if make:
        wrong.mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(wrong))
    assert finder.find_comfyui() is None


def test_a_wrong_comfyui_path_is_named_and_nothing_installed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", "nowhere")
    monkeypatch.setattr(finder.sys, "argv", ["find_comfyui", "--install"])
    monkeypatch.setattr(finder, "install_comfyui", lambda: pytest.fail("installed"))
    assert finder.main() == 1
    assert "COMFYUI_PATH (nowhere)" in capsys.readouterr().err


def test_the_version_is_read_from_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_comfyui(tmp_path / "a", "0.8.0")
    assert finder.comfyui_version(made) == "0.8.0"
    monkeypatch.setenv("COMFYUI_PATH", str(made))
    monkeypatch.setattr(finder.sys, "argv", ["find_comfyui", "--version"])
    assert finder.main() == 0
    assert capsys.readouterr().out == "0.8.0\n"
    assert finder.comfyui_version(tmp_path / "b") == "unknown"


def test_a_command_that_fails_gives_one_line(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo trying; echo 'fatal: no such host'; echo; echo later; exit 3"]
    assert finder._run(command, {}, 10) == "fatal: no such host"
    assert finder._run(["sh", "-c", "exit 3"], {}, 10) == "exit status 3"
    assert finder._run([str(tmp_path / "absent")], {}, 10) is not None
    assert finder._run(["true"], {}, 10) is None


def test_a_command_that_hangs_is_ended() -> None:
    problem = finder._run(["sleep", "60"], {}, 0.2)
    assert problem == "sleep had not finished after 0 seconds"
