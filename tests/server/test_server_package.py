"""The registry's zip, unpacked into an empty ComfyUI, works without the rest of the repository."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import copy_repository, run
from server_graphs import REFERENCES, pixels, small

from workshop.comfyui.comfy_server import PACK_NAME, ComfyServer
from workshop.comfyui.find_comfyui import find_comfyui
from workshop.demo.references import read_rows
from workshop.release import PINNED

_QUIET = ("--skip-prompt", "--no-enable-telemetry")
_MAX_BYTES = 20e6
# A second custom node, which logs whether the server can import `workshop`.
_PROBE = """
import importlib.util
print("workshop:", importlib.util.find_spec("workshop"), flush=True)
NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture(scope="module")
def package(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip that the registry would get: all files that git tracks or would add."""
    comfy = shutil.which("comfy", path=str(Path(sys.executable).parent)) or shutil.which("comfy")
    if comfy is None:
        pytest.skip("comfy-cli is needed to pack")
    copy = tmp_path_factory.mktemp("package")
    copy_repository(pack, copy)
    run([comfy, *_QUIET, "node", "pack"], copy)
    return copy / "node.zip"


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server that has only the unpacked zip of the pack."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or run workshop.comfyui.find_comfyui")
    base = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(base / "custom_nodes" / PACK_NAME)
    (base / "custom_nodes" / "probe.py").write_text(_PROBE, encoding="utf-8")
    with ComfyServer(comfyui, base) as running:
        yield running


def test_the_zip_holds_the_pinned_files_in_20_mb(package: Path) -> None:
    names = zipfile.ZipFile(package).namelist()
    assert sorted(names) == PINNED.read_text(encoding="utf-8").splitlines()
    assert package.stat().st_size <= _MAX_BYTES


def test_the_server_cannot_import_the_workshop(unpacked: ComfyServer) -> None:
    assert "workshop: None" in unpacked.log, unpacked.log
    assert not (unpacked.base / "custom_nodes" / PACK_NAME / "workshop").exists()


def test_the_unpacked_package_registers_every_node(unpacked: ComfyServer, pack: Path) -> None:
    wanted = {page.stem for page in (pack / "web" / "docs").glob("EasyRef*.md")}
    assert wanted <= unpacked.get_json("/object_info").keys()


def test_the_unpacked_package_runs_the_character_workflow(unpacked: ComfyServer) -> None:
    for name, picture in zip(REFERENCES, read_rows()[0].references, strict=False):
        unpacked.upload(name, picture)
    assert pixels(unpacked, small()).std() > 0
    assert "Traceback" not in unpacked.log
