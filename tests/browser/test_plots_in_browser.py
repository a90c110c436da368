"""The plots of EasyRef Stages and EasyRef MLLM Layers, in ComfyUI's page."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_page import MODES, ComfyPage

SET = """values => {
    const node = app.graph.nodes.find((n) => n.type.startsWith("EasyRef"));
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((w) => w.name === name);
        widget.value = value;
        widget.callback?.(value, app.canvas, node);
    }
    app.graph.setDirtyCanvas(true, true);
}"""
VALUES = """() => Object.fromEntries(app.graph.nodes.find((n) => n.type === "EasyRefStages")
    .widgets.filter((w) => w.serialize !== false).map((w) => [w.name, w.value]))"""
NUMBERS = (
    """() => [...document.querySelectorAll("[data-node-id] input")].map((i) => Number(i.value))"""
)

LINK = """() => {
    const node = app.graph.nodes.find((n) => n.type === "EasyRefStages");
    const number = LiteGraph.createNode("PrimitiveFloat");
    app.graph.add(number);
    number.connect(0, node, node.findInputSlot("identity_end"));
}"""

LINK_PRESET = """() => {
    const node = app.graph.nodes.find((n) => n.type === "EasyRefStages");
    const chosen = LiteGraph.createNode("PrimitiveNode");
    app.graph.add(chosen);
    chosen.connect(0, node, node.findInputSlot("preset"));
    node.widgets.find((widget) => widget.name === "tokens_end").value = 0.4;
}"""

HEIGHTS = """() => [...document.querySelectorAll(".easyref-layers svg")].map((svg) =>
    [...svg.children].map((bar) => Number(bar.getAttribute("height"))))"""


def plot(page: ComfyPage) -> str:
    """What a screen reader says of the plot."""
    page.next_frames()
    return page.tab.locator(".easyref-plot").get_attribute("aria-label")


@pytest.mark.parametrize("mode", MODES)
def test_the_plot_follows_presets_and_values(page: ComfyPage, mode: str, screenshots: Path) -> None:
    page.add_node("EasyRefStages")
    page.wait_for(lambda: "tokens: 0 – 100 %, weight 1. identity: 0 – 100 %" in plot(page))
    page.evaluate(SET, {"preset": "noise"})
    page.wait_for(lambda: "tokens: 0 – 18 %" in plot(page), lambda: plot(page))
    values = page.evaluate(VALUES)
    if mode == "vue":  # elements of their own
        wanted = [0, 0.18, 1, 0, 1, 1, 0]
        page.wait_for(lambda: page.evaluate(NUMBERS) == wanted, lambda: page.evaluate(NUMBERS))
    page.screenshot(screenshots, "stages")
    assert (values["preset"], values["tokens_end"], values["identity_start"]) == ("noise", 0.18, 0)
    page.evaluate(SET, {"tokens_end": 0.5, "cross_fade": 0.2, "identity_weight": -0.5})
    page.wait_for(lambda: "tokens: 0 – 50 %" in plot(page), lambda: plot(page))
    assert "identity: 0 – 100 %, weight -0.5" in plot(page)
    assert "Fades over 20 %" in plot(page)
    assert page.evaluate(VALUES)["preset"] == "custom"
    page.screenshot(screenshots, "stages_custom")
    page.load(page.workflow())
    page.wait_for(lambda: "tokens: 0 – 50 %" in plot(page), lambda: plot(page))
    page.evaluate(LINK)
    page.wait_for(lambda: "identity: set by a link" in plot(page), lambda: plot(page))
    assert "tokens: 0 – 50 %" in plot(page)


def test_a_preset_that_a_link_sets_leaves_loaded_boundaries_alone(page: ComfyPage) -> None:
    page.add_node("EasyRefStages")
    page.wait_for(lambda: "tokens: 0 – 100 %" in plot(page), lambda: plot(page))
    page.evaluate(LINK_PRESET)
    page.load(page.workflow())
    page.wait_for(lambda: "tokens: set by a link" in plot(page), lambda: plot(page))
    assert page.evaluate(VALUES)["tokens_end"] == 0.4


@pytest.mark.parametrize("mode", MODES)
def test_each_layer_of_the_mllm_has_a_bar(page: ComfyPage, screenshots: Path) -> None:
    page.add_node("EasyRefMllmLayers")
    page.wait_for(lambda: "text: 1, attention 1. pictures: 1, attention 1" in plot(page))
    page.evaluate(SET, {"preset": "late", "picture_layers": "1, 0", "picture_weight": 0.5})
    said = "text: 0.25 – 1.75, attention 1. pictures: 0.25 – 0.51 – 0, attention 0.5"
    page.wait_for(lambda: said in plot(page), lambda: plot(page))
    heights = page.evaluate(HEIGHTS)
    assert [len(row) for row in heights] == [28, 28]
    assert heights[0] == sorted(heights[0])
    assert (heights[0][-1], heights[1][-1]) == (1, 0)
    page.screenshot(screenshots, "layers")
    page.evaluate(SET, {"text_layers": "1; 2"})
    page.wait_for(lambda: "text: not numbers" in plot(page), lambda: plot(page))
