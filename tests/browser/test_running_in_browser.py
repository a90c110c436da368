"""Templates queued from ComfyUI's page: previews on the nodes, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_page import MODES, ComfyPage
from goldens import ADAPTER, MLLM

from easyref_core.encode.heat_maps import FOOTER, SIDE
from workshop.comfyui.comfy_server import ComfyServer
from workshop.comfyui.page import PATIENCE

pytestmark = pytest.mark.parametrize("mode", MODES)

OTHER = "for_another_model.safetensors"
FEW_STEPS = """() => {
    const sampler = app.graph.nodes.find((node) => node.type === "KSampler");
    sampler.widgets.find((widget) => widget.name === "steps").value = 4;
}"""
ADD_INSPECT = """() => {
    const find = (kind) => app.graph.nodes.find((node) => node.type === kind);
    const node = LiteGraph.createNode("EasyRefInspect");
    app.graph.add(node);
    node.pos = [0, 2000];
    const demo = find("EasyRefDemoModels");
    for (const name of ["easyref", "images"]) demo.connect(demo.findOutputSlot(name), node, name);
}"""
CARDS = """() => app.nodeOutputs[
    app.graph.nodes.find((node) => node.type === "EasyRefInspect").id].images.length"""
USE_OTHER_ADAPTER = """([adapter, mllm]) => {
    const loader = LiteGraph.createNode("EasyRefLoader");
    app.graph.add(loader);
    for (const [name, value] of Object.entries({adapter, mllm}))
        loader.widgets.find((widget) => widget.name === name).value = value;
    for (const node of app.graph.nodes)
        if (node.type === "EasyRefQuick") loader.connect(0, node, "easyref");
}"""


@pytest.fixture
def demo(page: ComfyPage) -> ComfyPage:
    """The template that runs on the demo models, in few steps."""
    page.load_template("easyref_try")
    page.evaluate(FEW_STEPS)
    return page


def test_a_queued_template_shows_its_result(demo: ComfyPage, screenshots: Path) -> None:
    demo.look_at("SaveImage")
    demo.queue()
    demo.wait_for(lambda: demo.shown("SaveImage"), lambda: demo.server.log[-2000:])
    demo.screenshot(screenshots, "result")
    assert demo.shown("SaveImage") == [[128, 128]]


def test_inspect_shows_a_card_for_each_reference(demo: ComfyPage, screenshots: Path) -> None:
    demo.evaluate(ADD_INSPECT)
    demo.look_at("EasyRefInspect")
    demo.queue()
    # In Nodes 2.0 they arrive one after the other, and ComfyUI's oldest page shows one at a time.
    minimum = 1 if demo.mode == "vue" else 4
    demo.wait_for(
        lambda: len(demo.shown("EasyRefInspect")) >= minimum, lambda: demo.server.log[-2000:]
    )
    demo.screenshot(screenshots, "inspector")
    assert demo.evaluate(CARDS) == 4
    assert all(size == [SIDE, SIDE + FOOTER] for size in demo.shown("EasyRefInspect"))


def test_an_adapter_for_another_model_shows_our_error_message(
    demo: ComfyPage, screenshots: Path, other_adapter: tuple[str, str]
) -> None:
    demo.evaluate(USE_OTHER_ADAPTER, list(other_adapter))
    demo.queue()
    sentence = demo.tab.get_by_text("cross-attention layers and " + OTHER + " was made for").first
    details = demo.tab.get_by_role("button", name="View details")  # newer pages show it there
    sentence.or_(details).first.wait_for(timeout=PATIENCE)
    if details.count():
        details.first.click()
    sentence.wait_for()
    demo.screenshot(screenshots, "error")
    assert "Connect a model of the architecture the adapter was trained on" in sentence.inner_text()


@pytest.fixture
def other_adapter(server: ComfyServer) -> tuple[str, str]:
    """An adapter for another UNet, and its MLLM, in the server's model folders."""
    models = server.base / "models"
    for link, target in ((models / "easyref" / OTHER, ADAPTER), (models / "LLM" / "other", MLLM)):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(target)
    assert OTHER in json.dumps(server.get_json("/object_info/EasyRefLoader"))
    return OTHER, "other"
