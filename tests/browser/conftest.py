"""ComfyUI's page in a real browser; without a browser every test here is skipped with a reason.

Each test runs on the page release that the ComfyUI requires and on the newest one, which
`make test` installs into a folder of the environment.

EASYREF_CHROMIUM      the browser to use, if it is not on the PATH
EASYREF_FRONTEND      the folder of another release of ComfyUI's page to use as the newest
EASYREF_SCREENSHOTS   the folder for screenshots of the page
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_page import ComfyPage

from workshop.comfyui.comfy_server import ComfyServer
from workshop.comfyui.find_comfyui import find_comfyui
from workshop.comfyui.page import NEWEST, chromium, write_user_files


@pytest.fixture(scope="session", params=["own", "newest"])
def release(request: pytest.FixtureRequest) -> str:
    """Which release of ComfyUI's page."""
    return request.param


@pytest.fixture(scope="session")
def server(release: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A separate server, as these tests change its settings."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or run workshop.comfyui.find_comfyui")
    arguments = ["--cpu"]
    if release == "newest":
        page = Path(os.environ.get("EASYREF_FRONTEND", NEWEST))
        if not (page / "index.html").is_file():
            pytest.skip("no newest page of ComfyUI: make test, or set EASYREF_FRONTEND")
        arguments += ["--front-end-root", str(page)]
    base = tmp_path_factory.mktemp("browser")
    write_user_files(comfyui, base)
    with ComfyServer(comfyui, base, arguments=arguments, seconds=300) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Closed after each file, as an event loop runs in this thread while it is open."""
    pytest.importorskip("playwright.sync_api", reason="no playwright: make test")
    with chromium() as running:
        if running is None:
            pytest.skip(
                "no Chromium: run tests/browser/install_chromium.sh, or set EASYREF_CHROMIUM"
            )
        yield running


@pytest.fixture(scope="module")
def tab(server: ComfyServer, browser: Any, release: str) -> Iterator[ComfyPage]:
    """One tab for all tests of a file: opening the page takes longer than most of them."""
    opened = ComfyPage(browser, server, release)
    yield opened
    opened.close()


@pytest.fixture
def mode() -> str:
    """How nodes are drawn, one of `MODES`; tests of both modes parametrize it."""
    return "classic"


@pytest.fixture
def page(tab: ComfyPage, mode: str) -> Iterator[ComfyPage]:
    """ComfyUI's page with an empty graph; afterwards it must have no errors of this pack."""
    tab.start_anew(mode)
    yield tab
    assert tab.mistakes() == []


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for screenshots of the page."""
    named = os.environ.get("EASYREF_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pack() -> Path:
    """The pack's own folder."""
    return Path(__file__).resolve().parents[2]
