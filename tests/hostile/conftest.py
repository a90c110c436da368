"""The server that runs the cases; without a ComfyUI, only those that need none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fork_server import ForkServer

from workshop.comfyui.find_comfyui import find_comfyui


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """torch, the core and, where there is one, ComfyUI with the pack."""
    folder = tmp_path_factory.mktemp("fork_server")
    comfyui = find_comfyui()
    arguments = [] if comfyui is None else ["--comfyui", str(comfyui), "--base", str(folder)]
    server = ForkServer(folder / "log", *arguments)
    yield server
    server.close()


@pytest.fixture(scope="session")
def training_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """torch, the core, training and the benchmark."""
    server = ForkServer(tmp_path_factory.mktemp("training_server") / "log", "--training")
    yield server
    server.close()
