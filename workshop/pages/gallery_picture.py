"""Photographs the gallery of EasyRef References for its help page, in ComfyUI and a real browser.

    python -m workshop.pages.gallery_picture

Needs ComfyUI, playwright and a Chromium (tests/browser/install_chromium.sh). The pictures in it are
the demo's references.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "web" / "docs" / "images" / "gallery.png"
sys.path.append(str(ROOT / "tests" / "browser"))

MARGIN = 14
SCALE = 2
COLOURS = 192


def main() -> None:
    from comfy_page import write_user_files

    from workshop.comfyui.comfy_server import ComfyServer
    from workshop.comfyui.find_comfyui import find_comfyui

    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("No ComfyUI found: set COMFYUI_PATH.")
    with tempfile.TemporaryDirectory() as base:
        write_user_files(comfyui, Path(base))
        with ComfyServer(comfyui, Path(base), arguments=["--cpu"], seconds=600) as server:
            picture = photograph(server)
    few = picture.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(OUT, optimize=True)
    print(f"{OUT}: {few.width} x {few.height}, {OUT.stat().st_size:,} bytes")


def photograph(server: Any) -> Image.Image:
    """The node, with a crop, a weight and the mouse on a picture."""
    from comfy_page import FLAGS, ComfyPage, find_chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(playwright), args=list(FLAGS)
        )
        page = ComfyPage(browser, server, scale=SCALE)
        page.start_anew("classic")
        page.add_node()
        page.choose_files(pictures())
        page.wait_for(lambda: page.tiles.count() == len(pictures()))
        page.wait_for_thumbnails()
        page.tile(3).locator(".easyref-weight").fill("0.5")
        page.tile(3).locator(".easyref-weight").press("Enter")
        page.evaluate(
            """() => {
                const node = app.graph.nodes[0];
                const text = node.widgets.find((w) => w.name === 'gallery');
                const content = JSON.parse(text.value);
                content.pictures[1].crop = [0.15, 0.05, 0.7, 0.7];
                text.value = JSON.stringify(content);
                app.graph.setDirtyCanvas(true, true);
                document.activeElement.blur();
            }"""
        )
        page.tab.wait_for_timeout(1500)
        page.wait_for_thumbnails()
        page.tile(2).hover()
        page.tab.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.tab.screenshot())).convert("RGB")
        left, top, right, bottom = page.evaluate(
            """() => {
                const {ds, canvas} = app.canvas;
                const {left, top} = canvas.getBoundingClientRect();
                const [x, y, w, h] = app.graph.nodes[0].boundingRect;
                const at = (px, py) => [(px + ds.offset[0]) * ds.scale + left,
                    (py + ds.offset[1]) * ds.scale + top];
                return [...at(x, y), ...at(x + w, y + h)];
            }"""
        )
        browser.close()
    box = (left - MARGIN, top - 2 * MARGIN, right + MARGIN, bottom + MARGIN)
    return picture.crop(tuple(round(side * SCALE) for side in box))


def pictures() -> list[dict[str, object]]:
    """Four of the demo's references of one character, in several shapes."""
    from workshop.demo.references import read_rows

    references = read_rows()[0].references
    shapes = ((1.0, 0.7), (0.7, 1.0), (1.0, 1.0), (0.8, 1.0))
    found = []
    for number, (picture, (wide, high)) in enumerate(zip(references, shapes, strict=True), start=1):
        width, height = picture.size
        left, top = width * (1 - wide) / 2, height * (1 - high) / 2
        part = picture.crop((round(left), round(top), round(width - left), round(height - top)))
        buffer = io.BytesIO()
        part.save(buffer, "PNG")
        name = f"character {number}.png"
        found.append({"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()})
    return found


if __name__ == "__main__":
    main()
