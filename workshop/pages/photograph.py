"""Photographs nodes for the help pages, in ComfyUI's page.

    python -m workshop.pages.photograph             all of web/docs/images
    python -m workshop.pages.photograph apply crop  some of them

Needs ComfyUI, playwright and a Chromium (tests/browser/install_chromium.sh). Graphs with previews
are run on the demo models, so results in the pictures are real.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..comfyui.find_comfyui import PACK
from ..comfyui.page import Page, newest_page
from ..demo.references import FOLDER, read_rows
from .graphs import GRAPHS, Graph

OUT = PACK / "web" / "docs" / "images"
MARGIN = 12
SCALE = 2
QUALITY = 85
TOKENS = "people/ann_00001_.safetensors"
RESULTS = ("EasyRefInspect", "PreviewAny", "PreviewImage")
SETTINGS = {
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
    "Comfy.Node.AllowImageSizeDraw": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.LinkRenderMode": -1,  # no links: they would wind around nodes that stand in rows
    "Comfy.Minimap.Visible": False,
}
BUILD = """async ({nodes}) => {
    const made = nodes.map(({kind, title, size, values}) => {
        const node = LiteGraph.createNode(kind);
        app.graph.add(node);
        if (title) node.title = title;
        for (const [name, value] of Object.entries(values)) {
            const widget = node.widgets.find((w) => w.name === name);
            widget.value = value;
            widget.callback?.(value);
        }
        return node;
    });
    nodes.forEach(({inputs}, index) => {
        for (const [name, {node, name: output}] of Object.entries(inputs)) {
            const from = made[node].outputs.findIndex((slot) => slot.name === output);
            const to = made[index].inputs.findIndex(
                (slot) => slot.name === name || slot.name.endsWith("." + name));
            if (from < 0 || to < 0) throw new Error(`${nodes[index].kind}: ${output} to ${name}`);
            made[node].connect(from, made[index], to);
        }
    });
    window.photographed = made;
}"""
RUN = """() => new Promise((done) => {
    const on = (name, read) => app.api.addEventListener(name, (e) => done(read(e)), {once: true});
    on("execution_success", () => null);
    on("execution_error", (e) => `${e.detail.node_type}: ${e.detail.exception_message}`);
    app.queuePrompt(0).then((queued) => queued === false && done("the graph was refused"));
})"""
# Keeps only the nodes shown, in rows; width and height in units of the graph.
LAY_OUT = """([rows, sizes]) => {
    const gap = 15, title = LiteGraph.NODE_TITLE_HEIGHT, made = window.photographed;
    const shown = new Set(rows.flat().map((index) => made[index]));
    for (const node of [...app.graph.nodes]) if (!shown.has(node)) app.graph.remove(node);
    let top = 0, width = 0;
    for (const row of rows) {
        let left = 0, height = 0;
        for (const index of row) {
            const node = made[index], size = sizes[index];
            if (size) node.setSize([size[0], size[1] || node.computeSize()[1]]);
            node.pos = [left, top + title];
            left += node.size[0] + gap;
            height = Math.max(height, node.size[1] + title);
        }
        width = Math.max(width, left - gap);
        top += height + gap;
    }
    return [width, top - gap];
}"""
LOOK = """(offset) => {
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = offset;
    app.canvas.deselectAll?.();
    document.activeElement.blur();
    app.graph.setDirtyCanvas(true, true);
    const {left, top} = app.canvas.canvas.getBoundingClientRect();
    return [left, top];
}"""
ARRIVED = """() => app.graph.nodes.every((node) =>
    node.type !== "PreviewImage" || node.imgs?.every((image) => image.complete))
    && [...document.querySelectorAll(".easyref-tile img")].every((image) => image.naturalWidth)"""


def write_inputs(folder: Path) -> None:
    """The pictures and masks that the graphs load, into ComfyUI's input folder."""
    (folder / "easyref").mkdir(parents=True)
    for row in read_rows():
        for number, picture in enumerate(row.references, start=1):
            picture.save(folder / "easyref" / f"{row.name} {number}.png")
    for number, (wide, high) in ((1, (1.0, 0.7)), (2, (0.7, 1.0)), (4, (0.8, 1.0))):
        file = folder / "easyref" / f"flower {number}.png"  # of several shapes
        with Image.open(file) as picture:
            (width, height), (x, y) = picture.size, ((1 - wide) / 2, (1 - high) / 2)
            box = (width * x, height * y, width * (1 - x), height * (1 - y))
            picture.crop(tuple(map(round, box))).save(file)
    for name, box in (("left half", (0, 0, 127, 255)), ("right half", (128, 0, 255, 255))):
        mask = Image.new("RGB", (256, 256))
        ImageDraw.Draw(mask).rectangle(box, "white")
        mask.save(folder / f"{name}.png")
    scene = Image.open(FOLDER / "drop_with_friends" / "1.png").convert("RGB")
    alpha = Image.new("L", scene.size, 255)
    ImageDraw.Draw(alpha).ellipse((12, 104, 100, 222), 100)  # what the mask editor leaves
    scene.putalpha(alpha)
    scene.save(folder / "masked.png")


def write_models(base: Path) -> None:
    """Empty files under the names that the loaders show, so that the page misses none."""
    names = ("models/easyref/model.safetensors", f"output/easyref_tokens/{TOKENS}")
    for name in names:
        (base / name).parent.mkdir(parents=True)
        (base / name).touch()
    for folder, kind in (
        ("LLM/Qwen2-VL-2B-Instruct", "qwen2_vl"),
        ("easyref_score/clip-vit-large-patch14", "clip"),
        ("easyref_score/dinov2-small", "dinov2"),
    ):
        model = base / "models" / folder
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")


def photograph(page: Page, graph: Graph) -> Image.Image:
    """Build a graph, run it if it shows results, and take a picture of the nodes that are shown."""
    page.clear()
    page.evaluate(BUILD, {"nodes": [dataclasses.asdict(node) for node in graph.nodes]})
    if any(node.kind in RESULTS for node in graph.nodes):
        problem = page.evaluate(RUN)
        if problem:
            raise SystemExit(problem)
    page.tab.wait_for_timeout(1000)
    page.tab.wait_for_function(ARRIVED)
    rows = [[node.index for node in row] for row in graph.rows]
    width, height = page.evaluate(LAY_OUT, [rows, [node.size for node in graph.nodes]])
    x, y = 500, 120  # clear of the page's side bar and menus
    left, top = page.evaluate(LOOK, [x, y])
    page.tab.wait_for_timeout(1000)
    if graph.hover:
        page.tab.locator(graph.hover).hover()
        page.tab.wait_for_timeout(500)
    clip = {
        "x": left + x - MARGIN,
        "y": top + y - MARGIN,
        "width": width + 2 * MARGIN,
        "height": height + 2 * MARGIN,
    }
    return Image.open(io.BytesIO(page.tab.screenshot(clip=clip))).convert("RGB")


def main(names: Sequence[str]) -> None:
    unknown = sorted(set(names) - GRAPHS.keys())
    if unknown:
        raise SystemExit(f"No such picture: {', '.join(unknown)}. There are {', '.join(GRAPHS)}.")
    with newest_page((1280, 1400), SCALE, write_files) as page:
        for name, value in SETTINGS.items():
            page.setting(name, value)
        for name in names or GRAPHS:
            picture = photograph(page, GRAPHS[name]())
            path = OUT / f"{name}.webp"
            picture.save(path, quality=QUALITY, method=6)
            print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size:,} bytes")


def write_files(base: Path) -> None:
    """Write the pictures and model files that the graphs name into a server's base folder."""
    write_inputs(base / "input")
    write_models(base)


if __name__ == "__main__":
    main(sys.argv[1:])
