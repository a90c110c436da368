"""ComfyUI-Manager itself installs the pack from a git address into a bare ComfyUI.

No request leaves this computer: the address is that of a local HTTP server.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from repository import copy_repository, run

from workshop.comfyui.comfy_server import PACK_NAME, ComfyServer
from workshop.comfyui.find_comfyui import find_comfyui

# Folders that are empty in a fresh ComfyUI, and what the copy does not need to run.
_EMPTY = ("custom_nodes", "models", "input", "output", "temp", "user")
_NOT_COPIED = {*_EMPTY, ".git", "tests", "tests-unit"}


@pytest.fixture(scope="module")
def manager() -> Path:
    """ComfyUI-Manager's command-line program."""
    program = shutil.which("cm-cli", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("no ComfyUI-Manager (package comfyui_manager): make test")
    return Path(program)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ComfyUI without custom nodes; Manager installs into the ComfyUI it runs in."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or run workshop.comfyui.find_comfyui")
    copy = tmp_path_factory.mktemp("bare") / "ComfyUI"
    copy.mkdir()
    for folder in _EMPTY:
        (copy / folder).mkdir()
    for part in comfyui.iterdir():
        if part.is_file():
            shutil.copy(part, copy)
        elif part.name not in _NOT_COPIED and not part.name.startswith((".venv", "venv")):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(part, copy / part.name, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def address(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the repository can be cloned from over http."""
    folder = tmp_path_factory.mktemp("git")
    copy_repository(pack, folder / "work")
    bare = folder / "served" / f"{PACK_NAME}.git"
    run(["git", "clone", "-q", "--bare", str(folder / "work"), str(bare)], folder)
    run(["git", "update-server-info"], bare)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder / "served"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{bare.name}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_manager_installs_the_pack_and_every_node_loads(
    manager: Path, bare: Path, address: str, pack: Path
) -> None:
    nowhere = "http://127.0.0.1:9"  # a closed port: requests to the internet fail at once
    environment = {
        **os.environ,
        "COMFYUI_PATH": str(bare),
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_PROXY": "127.0.0.1",
        "GIT_TERMINAL_PROMPT": "0",
    }
    output = run([str(manager), "install", address, "--exit-on-fail"], bare, **environment)
    assert "[INSTALLED]" in output, output
    installed = bare / "custom_nodes" / PACK_NAME
    assert (installed / ".git").is_dir()
    assert not installed.is_symlink()
    with ComfyServer(bare, bare) as server:
        object_info = server.get_json("/object_info")
        assert "IMPORT FAILED" not in server.log
    wanted = {page.stem for page in (pack / "web" / "docs").glob("EasyRef*.md")}
    assert len(wanted) > 10
    modules = {name: object_info[name]["python_module"] for name in wanted & object_info.keys()}
    assert modules == dict.fromkeys(wanted, f"custom_nodes.{PACK_NAME}")
