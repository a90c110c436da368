"""ComfyUI's page in a headless browser: opened, given graphs, run and photographed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .comfy_server import ComfyServer
from .find_comfyui import find_comfyui

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Nothing here depends on another site; asking for one fails at once.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
NEWEST = Path(sys.prefix, "newest-page", "comfyui_frontend_package", "static")
# Else the page shows its templates on a first visit and opens the graphs of the last one.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60_000  # milliseconds; on a busy computer
_START_PATIENCE = 120_000
_READY = """() => !!(window.app && app.graph && app.extensionManager
    && LiteGraph.registered_node_types["EasyRefReferences"])"""
# Newer pages open a graph by themselves, soon; 1.35 does not.
_SETTLED = """() => !!app.extensionManager.workflow?.activeWorkflow?.changeTracker
    || performance.now() - (window.easyrefAsked ??= performance.now()) > 3000"""
_LOADED = "() => !!app.extensionManager.workflow?.activeWorkflow?.changeTracker"
# Clearing alone leaves the widgets of removed nodes on the page.
_CLEAR = """() => {
    for (const node of [...app.graph.nodes]) app.graph.remove(node);
    app.graph.clear();
}"""
NO_NODES = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4}


def find_chromium(playwright: Any) -> str | None:
    """The browser named by EASYREF_CHROMIUM, else one on the PATH, else playwright's own."""
    on_path = filter(None, map(shutil.which, BROWSERS))
    own = playwright.chromium.executable_path
    path = os.environ.get("EASYREF_CHROMIUM") or next(on_path, own)
    return path if Path(path).exists() else None


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser.

    Yields:
        playwright's browser; None where no Chromium is installed.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        executable = find_chromium(playwright)
        if executable is None:
            yield None
            return
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield browser
        browser.close()


def write_user_files(comfyui: Path, base: Path) -> None:
    """Write a server's settings and ComfyUI's own example picture, before the page is opened."""
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    (base / "input").mkdir()
    shutil.copy(comfyui / "input" / "example.png", base / "input")


@contextmanager
def newest_page(
    size: tuple[int, int] = (1280, 900),
    scale: float = 1,
    prepare: Callable[[Path], None] = lambda base: None,
) -> Iterator[Page]:
    """The newest page that is installed, on a ComfyUI of its own, drawn on the classic canvas.

    Args:
        size, scale: see `Page`.
        prepare: writes further files into the server's base folder before it starts.

    Raises:
        SystemExit: there is no ComfyUI or no Chromium.
    """
    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("No ComfyUI found: set COMFYUI_PATH.")
    arguments = ["--cpu"]
    if NEWEST.is_dir():
        arguments += ["--front-end-root", str(NEWEST)]
    with tempfile.TemporaryDirectory() as base, chromium() as browser:
        if browser is None:
            raise SystemExit("No Chromium found: run tests/browser/install_chromium.sh.")
        write_user_files(comfyui, Path(base))
        prepare(Path(base))
        with ComfyServer(comfyui, Path(base), arguments=arguments, seconds=600) as server:
            page = Page(browser, server, size, scale)
            page.open()
            page.set_mode("classic")
            yield page


class Page:
    """A tab with ComfyUI.

    Args:
        browser: playwright's.
        size: of the window, in CSS pixels.
        scale: device pixels for a CSS pixel.
    """

    def __init__(
        self,
        browser: Any,
        server: ComfyServer,
        size: tuple[int, int] = (1280, 900),
        scale: float = 1,
    ) -> None:
        self.server = server
        self.mode = "classic"
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, locale="en", device_scale_factor=scale
        )
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(PATIENCE)

    def open(self) -> None:
        """Load the page, or load it again, and start with an empty graph."""
        self.tab.goto(self.server.url, timeout=_START_PATIENCE)
        self.tab.wait_for_function(_READY, timeout=_START_PATIENCE)
        self.tab.wait_for_function(_SETTLED, timeout=_START_PATIENCE)
        self.clear()
        self.tab.wait_for_function(_LOADED, timeout=_START_PATIENCE)

    def close(self) -> None:
        self.context.close()

    def clear(self) -> None:
        """An empty graph; undo goes no further back than this."""
        self.evaluate(_CLEAR)
        self.load(NO_NODES)

    def set_mode(self, mode: str) -> None:
        """How nodes are drawn.

        Args:
            mode: "classic" on the canvas, "vue" for what ComfyUI calls Nodes 2.0.
        """
        self.mode = mode
        self.setting("Comfy.VueNodes.Enabled", mode == "vue")
        self.tab.wait_for_function(
            f"() => !!LiteGraph.vueNodesMode === {json.dumps(mode == 'vue')}"
        )

    def close_dialogs(self) -> None:
        dialogs = self.tab.locator("[role=dialog]:visible")
        for _ in range(PATIENCE // 100):
            if not dialogs.count():
                return
            self.tab.keyboard.press("Escape")
            self.tab.wait_for_timeout(100)

    def evaluate(self, script: str, value: Any = None) -> Any:
        return self.tab.evaluate(script, value)

    def setting(self, name: str, value: Any) -> None:
        self.evaluate("([n, v]) => app.extensionManager.setting.set(n, v)", [name, value])

    def load(self, workflow: dict[str, Any]) -> None:
        self.evaluate("workflow => app.loadGraphData(workflow)", workflow)

    def queue(self) -> None:
        """As the button Run does."""
        self.evaluate("() => app.queuePrompt(0)")
