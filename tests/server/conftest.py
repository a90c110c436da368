"""One ComfyUI server for all tests in this folder; without a ComfyUI they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_graphs import CONTROL, FOURTH, OTHERS, REFERENCES

from workshop.comfyui.comfy_server import ComfyServer
from workshop.comfyui.find_comfyui import find_comfyui
from workshop.demo.references import read_rows

SIZES = ((320, 224), (224, 320), (256, 256))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running server with the pack installed and pictures of several sizes uploaded."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or run workshop.comfyui.find_comfyui")
    with ComfyServer(comfyui, tmp_path_factory.mktemp("server")) as running:
        first, other, *_ = read_rows()
        for names, row in ((REFERENCES, first), (OTHERS, other)):
            for name, size, picture in zip(names, SIZES, row.references, strict=False):
                running.upload(name, picture.resize(size))
        running.upload(FOURTH, other.references[0])
        running.upload(CONTROL, first.references[3])
        yield running


@pytest.fixture(scope="session")
def pack() -> Path:
    """The pack's own folder."""
    return Path(__file__).resolve().parents[2]
