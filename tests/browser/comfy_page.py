"""ComfyUI's page as a user operates it, with the gallery of one EasyRef References node."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from PIL import Image, ImageDraw

from workshop.comfyui.comfy_server import ComfyServer
from workshop.comfyui.page import NO_NODES, PATIENCE, Page

MODES = ("classic", "vue")
# Mutes a group's nodes as its menu does.
MUTE = """title => {
    const group = app.graph.groups.find((g) => g.title === title);
    group.recomputeInsideNodes();
    const muted = group.nodes ?? group._nodes;
    for (const node of muted) node.mode = LiteGraph.NEVER;
    return muted.map((node) => node.type).sort();
}"""
NODES = "count => app.graph.nodes.length === count"
# Width and height of each loaded picture on the nodes of a class.
SHOWN = """kind => app.graph.nodes.filter((node) => node.type === kind).flatMap((node) => {
    const drawn = node.imgs?.length ? node.imgs : [];
    const placed = document.querySelectorAll(`[data-node-id="${node.id}"] img`);
    return [...(LiteGraph.vueNodesMode && placed.length ? placed : drawn)]
        .filter((i) => i.complete).map((i) => [i.naturalWidth, i.naturalHeight]);
})"""
LOOK_AT = """kind => {
    const [x, y] = app.graph.nodes.find((node) => node.type === kind).pos;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [200 - x, 160 - y];
    app.graph.setDirtyCanvas(true, true);
}"""
NEW_NODE = """type => {
    const node = LiteGraph.createNode(type);
    node.pos = [240, 40];
    app.graph.add(node);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [60, 60];
    app.graph.setDirtyCanvas(true, true);
    return node.id;
}"""
TWO_FRAMES = """() => new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(() => done())))"""
# The page animates the view; the move is over when the view stays the same for a while.
VIEW_STILL = """() => {
    const view = JSON.stringify([app.canvas.ds.scale, ...app.canvas.ds.offset]);
    const now = performance.now();
    if (window.easyrefView?.view !== view) window.easyrefView = {view, since: now, frames: 0};
    return ++window.easyrefView.frames > 10 && now - window.easyrefView.since > 300;
}"""
# True when no undo has been running for a few frames.
STEPS_DONE = """() => {
    const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
    const busy = tracker._restoringState || tracker.changeCount;
    tracker.easyrefIdle = busy ? 0 : (tracker.easyrefIdle ?? 0) + 1;
    if (tracker.easyrefIdle < 4) return false;
    return delete tracker.easyrefIdle;
}"""
RENDERERS = {"classic": "LG", "vue": "Vue"}
FREE = (700, 450)  # a point of the page beside the node that `add_node` adds
# ComfyUI's own errors: one at the start, two when a node with linked autogrow inputs is removed,
# and the request for a help page in the page's language before the English one.
KNOWN_ERRORS = (
    "reading 'id'",
    "access LGraph reference that was null",
    "reading 'min'",
    "/extensions/easyref/docs/EasyRefApply/",
)
OWN = "/extensions/easyref/"
OTHER_SITES = re.compile(r"\b(?:https?|wss?)://(?!127\.0\.0\.1\b)\S+")


class ComfyPage(Page):
    """A tab with ComfyUI.

    Args:
        release: the page's release, for the names of screenshots.
    """

    def __init__(self, browser: Any, server: ComfyServer, release: str = "own") -> None:
        super().__init__(browser, server)
        self.release = release
        self._problems: list[str] = []
        self.tab.on("pageerror", lambda error: self._note(f"error: {error}"))
        self.tab.on("console", self._on_console)
        network = self.context.new_cdp_session(self.tab)
        network.send("Network.enable")
        network.on("Network.requestWillBeSent", self._on_request)
        network.on("Network.webSocketCreated", self._on_request)
        self.open()

    def start_anew(self, mode: str) -> None:
        """Start with an empty graph in one of `MODES`; faster than loading the page."""
        self._problems.clear()
        self.close_dialogs()
        self.clear()
        self.set_mode(mode)
        # Undo goes back no further than this. Without a renderer version each undo would lay the
        # graph out again, which is one more change.
        self.load(NO_NODES | {"extra": {"workflowRendererVersion": RENDERERS[mode]}})
        self.wait_for_undo_steps()
        self.tab.mouse.move(*FREE)  # nothing to hover there

    def next_frames(self) -> None:
        """Wait for two frames: the first draws the changes, and the page reacts in the second."""
        self.evaluate(TWO_FRAMES)

    def wait_for_undo_steps(self) -> None:
        """Wait until every change is an undo step; keys pressed during an undo are misread."""
        self.tab.wait_for_function(STEPS_DONE)

    def click_beside(self, down: int = 0) -> None:
        """Click on the empty canvas; the page then checks whether the graph has changed.

        Args:
            down: pixels from the usual place; two clicks at one place open the search for nodes.
        """
        self.tab.mouse.click(FREE[0], FREE[1] + down)
        self.wait_for_undo_steps()

    def screenshot(self, folder: Path, name: str) -> None:
        """Save a screenshot; its name contains the mode and the page's release."""
        self.tab.screenshot(path=folder / f"{name}_{self.mode}_{self.release}.png")

    def mistakes(self) -> list[str]:
        """Errors and warnings on the page, except ComfyUI's own known errors."""
        return [p for p in self._problems if not any(known in p for known in KNOWN_ERRORS)]

    def _note(self, problem: str) -> None:
        self._problems.append(problem)

    def _on_console(self, message: Any) -> None:
        source = message.location.get("url", "")
        if OTHER_SITES.match(source):
            return  # a request of the page itself, see _on_request
        text = f"{message.text} ({source})"
        if message.type in ("error", "warning") and "easyref" in OTHER_SITES.sub("", text).lower():
            self._note(f"{message.type}: {text}")

    def _on_request(self, event: dict[str, Any]) -> None:
        """The page itself asks other sites for news and models; this pack must not ask any."""
        url = event.get("url") or event["request"]["url"]
        if OTHER_SITES.match(url) and OWN in json.dumps(event.get("initiator", {})):
            self._note(f"a request of this pack to {urlparse(url).hostname}")

    # The graph

    def add_node(self, kind: str = "EasyRefReferences") -> Any:
        """Add a node to the canvas and return its id."""
        return self.evaluate(NEW_NODE, kind)

    def workflow(self) -> dict[str, Any]:
        """The workflow as saving would write it."""
        return json.loads(self.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def load_template(self, name: str) -> None:
        """A template of the pack, as Browse Templates opens it."""
        template = self.server.get_json(f"/api/workflow_templates/easyref/{name}.json")
        self.load(template)
        self.tab.wait_for_function(NODES, arg=len(template["nodes"]))

    def fit_view(self) -> None:
        """Show the whole graph."""
        self.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.tab.wait_for_function(VIEW_STILL)
        self.next_frames()

    def mute_group(self, title: str) -> list[str]:
        """Mute a group's nodes and return their classes."""
        return self.evaluate(MUTE, title)

    def look_at(self, kind: str) -> None:
        """Move the view to a node; the canvas draws only visible nodes."""
        self.evaluate(LOOK_AT, kind)

    def shown(self, kind: str) -> list[list[int]]:
        """Width and height of each picture that nodes of a class show."""
        return self.evaluate(SHOWN, kind)

    def prompt(self) -> dict[str, Any]:
        """The graph in ComfyUI's API form."""
        return self.evaluate("async () => (await app.graphToPrompt()).output")

    # The gallery

    @property
    def gallery(self) -> Any:
        return self.tab.locator(".easyref-gallery")

    @property
    def tiles(self) -> Any:
        return self.tab.locator(".easyref-tile")

    def tile(self, place: int) -> Any:
        """The tile at a place, counted from 1."""
        return self.tiles.nth(place - 1)

    def state(self, node: int = 0) -> list[dict[str, Any]]:
        """The pictures as the workflow stores them."""
        nodes = [n for n in self.workflow()["nodes"] if n["type"] == "EasyRefReferences"]
        text = sorted(nodes, key=lambda n: n["id"])[node]["widgets_values"][1]
        return json.loads(text)["pictures"] if text else []

    def files(self, node: int = 0) -> list[str]:
        return [picture["file"].removeprefix("easyref/") for picture in self.state(node)]

    def paths(self, node: int = 0) -> list[str]:
        """As `files`, with their folders."""
        return [picture["file"] for picture in self.state(node)]

    def wait_for_files(self, *files: str) -> None:
        """Wait until the workflow has exactly these uploads, and they are shown."""
        self.wait_for(lambda: self.files() == list(files), lambda: self.files())
        self.wait_for(lambda: self.tiles.count() == len(files), lambda: self.tiles.count())

    def wait_for(self, condition: Any, actual: Any = lambda: "") -> None:
        for _ in range(PATIENCE // 100):
            if condition():
                return
            self.tab.wait_for_timeout(100)
        raise AssertionError(f"it did not come true; found {actual()}")

    def wait_for_thumbnails(self) -> None:
        script = """() => [...document.querySelectorAll('.easyref-tile:not([data-lost]) img')]
            .every(image => image.complete && image.naturalWidth > 0)"""
        self.tab.wait_for_function(script)

    def choose_files(self, files: Sequence[dict[str, Any]]) -> None:
        """Choose files as with "Add files"."""
        self.gallery.locator("input[type=file]").set_input_files(files)

    def drop_files(
        self, selector: str, files: Sequence[dict[str, Any]], kind: str = "drop"
    ) -> None:
        """Drop or paste local files on an element."""
        script = """async ([selector, files, kind]) => {
            const data = new DataTransfer();
            for (const {name, mimeType, hex} of files) {
                const bytes = Uint8Array.from(hex.match(/../g).map((h) => parseInt(h, 16)));
                data.items.add(new File([bytes], name, {type: mimeType}));
            }
            const target = document.querySelector(selector);
            const options = {bubbles: true, cancelable: true};
            if (kind === 'paste') {
                const event = new ClipboardEvent(kind, {...options, clipboardData: data});
                target.dispatchEvent(event);
                return;
            }
            const {left, top, width, height} = target.getBoundingClientRect();
            const at = {clientX: left + width / 2, clientY: top + height / 2};
            for (const name of ['dragenter', 'dragover', 'drop']) {
                const event = new DragEvent(name, {...options, ...at, dataTransfer: data});
                target.dispatchEvent(event);
            }
        }"""
        hexed = [
            {"name": f["name"], "mimeType": f["mimeType"], "hex": f["buffer"].hex()} for f in files
        ]
        self.evaluate(script, [selector, hexed, kind])

    def drop_data(self, selector: str, data: dict[str, str]) -> None:
        """Drop what the page's own pictures carry, type -> text, on an element."""
        script = """([selector, data]) => {
            const dataTransfer = new DataTransfer();
            for (const [type, text] of Object.entries(data)) dataTransfer.setData(type, text);
            const target = document.querySelector(selector);
            for (const name of ['dragenter', 'dragover', 'drop']) {
                const options = {bubbles: true, cancelable: true, dataTransfer};
                target.dispatchEvent(new DragEvent(name, options));
            }
        }"""
        self.evaluate(script, [selector, data])


def picture_file(name: str, colour: str, size: tuple[int, int] = (120, 90)) -> dict[str, Any]:
    """A drawn picture as a local file."""
    image = Image.new("RGB", size, colour)
    width, height = size
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.25, height * 0.2, width * 0.75, height * 0.8), "#f2c79b")
    for x in (0.42, 0.58):
        draw.ellipse((width * x - 4, height * 0.42, width * x + 4, height * 0.42 + 8), "#30241c")
    draw.arc((width * 0.4, height * 0.45, width * 0.6, height * 0.7), 20, 160, "#30241c", 3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def five_pictures() -> list[dict[str, Any]]:
    colours = ("#7a4b5c", "#4b6b7a", "#5f7a4b", "#7a6a4b", "#5c4b7a")
    sizes = ((300, 200), (200, 300), (256, 256), (400, 180), (220, 260))
    return [
        picture_file(f"face {number}.png", colour, size)
        for number, (colour, size) in enumerate(zip(colours, sizes, strict=True), start=1)
    ]
