"""Pictures that nobody here made: emoji of several open families, avatars of one generator.

`make test` fetches their packages beside the environment; without them tests are skipped.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from workshop.comfyui.page import chromium

PACKAGES = Path(sys.prefix, "open-pictures")
FAMILIES = ("noto", "twemoji", "openmoji", "fluent-emoji-flat")
STYLES = ("lorelei", "pixel-art")  # of avatars, whose designs are CC0
_AVATARS = """
import { createAvatar } from "@dicebear/core";
import * as style from "@dicebear/STYLE";
const options = JSON.parse(process.argv[2]);
const { license } = style.meta;
const svgs = options.map((each) => createAvatar(style, each).toString());
console.log(JSON.stringify({ svgs, licence: license.name }));
"""


def emoji(family: str, names: Sequence[str]) -> tuple[list[str], str]:
    """(SVG of each emoji, licence) of one family."""
    with tarfile.open(_package(f"iconify-json-{family}")) as tar:
        icons = json.load(tar.extractfile("package/icons.json"))  # type: ignore[arg-type]
        info = json.load(tar.extractfile("package/info.json"))  # type: ignore[arg-type]
    return [_svg(icons, name) for name in names], info["license"]["spdx"]


def avatars(style: str, options: Sequence[dict[str, Any]], folder: Path) -> tuple[list[str], str]:
    """(SVG of each avatar, licence of the design), as its generator draws them.

    Args:
        options: of the generator, for each avatar.
        folder: for the unpacked generator.
    """
    if shutil.which("node") is None:
        pytest.skip("no node, which draws the avatars")
    for name in ("core", style):
        with tarfile.open(_package(f"dicebear-{name}")) as tar:
            place = folder / "node_modules" / "@dicebear" / name
            # Pythons before 3.11.4 have no filters.
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(place, **safe)
            for path in (place / "package").iterdir():
                path.rename(place / path.name)
    script = folder / "draw.mjs"
    script.write_text(_AVATARS.replace("STYLE", style), encoding="utf-8")
    command = ["node", str(script), json.dumps(list(options))]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
    drawn = json.loads(done.stdout)
    return drawn["svgs"], drawn["licence"]


def rasterised(svgs: Sequence[str], side: int = 96) -> list[Image.Image]:
    """The drawings on white, as Chromium draws them."""
    pytest.importorskip("playwright.sync_api", reason="no playwright: make test")
    sources = (base64.b64encode(svg.encode()).decode() for svg in svgs)
    images = "".join(f'<img src="data:image/svg+xml;base64,{source}">' for source in sources)
    style = f"body {{ margin: 0; font-size: 0; width: {8 * side}px }} img {{ width: {side}px; "
    with chromium() as browser:
        if browser is None:
            pytest.skip("no Chromium: run tests/browser/install_chromium.sh")
        page = browser.new_page(viewport={"width": 8 * side, "height": side})
        page.set_content(f"<style>{style} height: {side}px }}</style>{images}")
        page.wait_for_function("[...document.images].every((image) => image.complete)")
        sheet = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        page.close()
    boxes = [(n % 8 * side, n // 8 * side) for n in range(len(svgs))]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in boxes]


def _package(name: str) -> Path:
    """
    Raises:
        Skipped: it was not fetched.
    """
    found = sorted(PACKAGES.glob(f"{name}-[0-9]*.tgz"))
    if not found:
        pytest.skip(f"no package {name}, which `make test` fetches where there is npm")
    return found[-1]


def _svg(icons: dict[str, Any], name: str) -> str:
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
