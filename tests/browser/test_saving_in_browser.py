"""EasyRef Save Tokens: placeholders are filled in when the graph is run, as for Save Image."""

from __future__ import annotations

import re
from typing import Any

import pytest
from comfy_page import MODES, ComfyPage

pytestmark = pytest.mark.parametrize("mode", MODES)

PREFIX = "%date:yyyy-MM-dd%/%EmptyLatentImage.width%_%Size.height%_%Nobody.seed%_%year%"
SAVE = """([kind, prefix]) => {
    const node = LiteGraph.createNode(kind);
    app.graph.add(node);
    node.widgets.find((widget) => widget.name === "filename_prefix").value = prefix;
    return String(node.id);
}"""
# Found by its class's name, then by its title.
SIZES = """() => ["EmptyLatentImage", "Size"].forEach((title, place) => {
    const node = LiteGraph.createNode("EmptyLatentImage");
    node.title = title;
    app.graph.add(node);
    node.widgets.find((widget) => widget.name === "width").value = 640 + 64 * place;
    node.widgets.find((widget) => widget.name === "height").value = 832;
})"""


def prefixes(page: ComfyPage) -> dict[str, Any]:
    """The prefix that each saving node's run gets."""
    nodes = page.prompt().values()
    found = {n["class_type"]: n["inputs"].get("filename_prefix") for n in nodes}
    return {kind: prefix for kind, prefix in found.items() if prefix is not None}


def test_placeholders_become_what_save_image_makes_of_them(page: ComfyPage) -> None:
    page.evaluate(SIZES)
    for kind in ("EasyRefSaveTokens", "SaveImage"):
        page.evaluate(SAVE, [kind, PREFIX])
    found = prefixes(page)
    assert found["EasyRefSaveTokens"] == found["SaveImage"]
    wanted = r"20\d\d-\d\d-\d\d/640_832_%Nobody\.seed%_%year%"
    assert re.fullmatch(wanted, found["EasyRefSaveTokens"])
    saved = [n for n in page.workflow()["nodes"] if n["type"] == "EasyRefSaveTokens"]
    assert saved[0]["widgets_values"][0] == PREFIX  # the workflow keeps the placeholders
