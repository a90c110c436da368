"""One ComfyUI server for all tests here; where there is no ComfyUI they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_graphs import CONTROL, OTHERS, REFERENCES

from easyref_core.demo.comfy_server import ComfyServer
from easyref_core.demo.drawing import FOX, MOUSE, draw_references, meadow
from easyref_core.demo.find_comfyui import find_comfyui


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running server with the pack inside and pictures of different sizes uploaded."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or run easyref_core.demo.find_comfyui")
    with ComfyServer(comfyui, tmp_path_factory.mktemp("server")) as running:
        for names, character in ((REFERENCES, FOX), (OTHERS, MOUSE)):
            for name, picture in zip(names, draw_references(character), strict=True):
                running.upload(name, picture)
        running.upload(CONTROL, meadow(FOX, 512, 512))
        yield running


@pytest.fixture(scope="session")
def pack() -> Path:
    """The pack's own folder."""
    return Path(__file__).resolve().parents[2]
