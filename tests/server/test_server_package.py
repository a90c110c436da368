"""The package for the registry, unpacked into an empty ComfyUI, is all that is needed."""

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

_QUIET = ("--skip-prompt", "--no-enable-telemetry")


@pytest.fixture(scope="module")
def package(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip that the registry would get, of all files that git knows or would take."""
    comfy = shutil.which("comfy", path=str(Path(sys.executable).parent)) or shutil.which("comfy")
    if comfy is None:
        pytest.skip("comfy-cli is needed to pack")
    copy = tmp_path_factory.mktemp("package")
    copy_repository(pack, copy)
    run([comfy, *_QUIET, "node", "pack"], copy)
    return copy / "node.zip"


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with nothing but the unpacked package."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or run workshop.comfyui.find_comfyui")
    base = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(base / "custom_nodes" / PACK_NAME)
    with ComfyServer(comfyui, base) as running:
        yield running


def test_the_package_holds_what_users_need_and_nothing_else(package: Path) -> None:
    names = set(zipfile.ZipFile(package).namelist())
    needed = {"__init__.py", "pyproject.toml", "LICENSE", "README.md"}
    needed |= {"locales/zh/nodeDefs.json", "subgraphs/EasyRef.json"}
    assert needed <= names
    assert any(name.startswith("web/docs/") for name in names)
    unwanted = ("tests/", "benchmarks/", ".ci/", ".github/", "docs/", "runs/", "Makefile")
    unwanted += ("recipes/", "workshop/")
    assert not [name for name in names if name.startswith(unwanted)]


def test_the_unpacked_package_offers_every_node(unpacked: ComfyServer, pack: Path) -> None:
    wanted = {page.stem for page in (pack / "web" / "docs").glob("EasyRef*.md")}
    assert wanted <= unpacked.get_json("/object_info").keys()


def test_the_unpacked_package_runs_the_first_workflow(unpacked: ComfyServer) -> None:
    for name, picture in zip(REFERENCES, read_rows()[0].references, strict=False):
        unpacked.upload(name, picture)
    assert pixels(unpacked, small()).std() > 0
    assert "Traceback" not in unpacked.log
