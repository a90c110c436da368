"""Templates queued from ComfyUI's page: what a person sees then, on the node or as an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_page import MODES, ComfyPage
from goldens import ADAPTER, MLLM

from easyref_core.encode.heat_maps import FOOTER, SIDE
from workshop.comfyui.comfy_server import ComfyServer
from workshop.comfyui.page import PATIENCE
from workshop.demo.references import read_rows

pytestmark = pytest.mark.parametrize("mode", MODES)

REFERENCES = ("reference_1.png", "reference_2.png", "reference_3.png")
OTHER = "for_another_model.safetensors"
# A 128-pixel picture in four steps.
SMALL = """() => {
    const set = (kind, name, value) => app.graph.nodes.filter((node) => node.type === kind)
        .forEach((node) => { node.widgets.find((w) => w.name === name).value = value; });
    for (const name of ["width", "height"]) set("EmptyLatentImage", name, 128);
    set("KSampler", "steps", 4);
}"""
FILL = """text => {
    const node = app.graph.nodes.find((node) => node.type === "EasyRefReferences");
    node.widgets.find((widget) => widget.name === "gallery").value = text;
}"""
ADD_INSPECTOR = """() => {
    const find = (kind) => app.graph.nodes.find((node) => node.type === kind);
    const node = LiteGraph.createNode("EasyRefInspect");
    app.graph.add(node);
    node.pos = [0, 2000];
    const [demo, references] = [find("EasyRefDemoModels"), find("EasyRefReferences")];
    demo.connect(demo.findOutputSlot("easyref"), node, "easyref");
    references.connect(references.findOutputSlot("references"), node, "references");
}"""
CARDS = """() => app.nodeOutputs[
    app.graph.nodes.find((node) => node.type === "EasyRefInspect").id].images.length"""
USE_OTHER_ADAPTER = """([adapter, mllm]) => {
    const loader = LiteGraph.createNode("EasyRefLoader");
    app.graph.add(loader);
    for (const [name, value] of Object.entries({adapter, mllm}))
        loader.widgets.find((widget) => widget.name === name).value = value;
    for (const node of app.graph.nodes)
        if (["EasyRefEncode", "EasyRefApply"].includes(node.type))
            loader.connect(0, node, "easyref");
}"""


@pytest.fixture
def demo(page: ComfyPage, server: ComfyServer) -> ComfyPage:
    """The first template on the demo models, with its pictures in ComfyUI's input."""
    for name, picture in zip(REFERENCES, read_rows()[0].references, strict=False):
        server.upload(name, picture)
    page.load_template("easyref_character")
    page.mute_group("1. Models")
    page.evaluate(SMALL)
    page.evaluate(FILL, json.dumps({"version": 1, "pictures": [{"file": f} for f in REFERENCES]}))
    return page


def test_a_template_shows_its_picture(demo: ComfyPage, screenshots: Path) -> None:
    demo.look_at("SaveImage")
    demo.queue()
    demo.wait_for(lambda: demo.shown("SaveImage"), lambda: demo.server.log[-2000:])
    demo.screenshot(screenshots, "result")
    assert demo.shown("SaveImage") == [[128, 128]]


def test_the_inspector_shows_a_card_for_each_reference(demo: ComfyPage, screenshots: Path) -> None:
    demo.evaluate(ADD_INSPECTOR)
    demo.look_at("EasyRefInspect")
    demo.queue()
    # In Nodes 2.0 they arrive one after the other, and ComfyUI's oldest page shows one at a time.
    least = 1 if demo.mode == "vue" else 3
    demo.wait_for(
        lambda: len(demo.shown("EasyRefInspect")) >= least, lambda: demo.server.log[-2000:]
    )
    demo.screenshot(screenshots, "inspector")
    assert demo.evaluate(CARDS) == 3
    assert all(size == [SIDE, SIDE + FOOTER] for size in demo.shown("EasyRefInspect"))


def test_an_adapter_for_another_model_is_told_in_our_words(
    demo: ComfyPage, screenshots: Path, other_adapter: tuple[str, str]
) -> None:
    demo.evaluate(USE_OTHER_ADAPTER, list(other_adapter))
    demo.queue()
    sentence = demo.tab.get_by_text("cross-attention layers and " + OTHER + " was made for").first
    details = demo.tab.get_by_role("button", name="View details")  # newer pages tell it there
    sentence.or_(details).first.wait_for(timeout=PATIENCE)
    if details.count():
        details.first.click()
    sentence.wait_for()
    demo.screenshot(screenshots, "error")
    assert "Connect a model of the architecture the adapter was trained on" in sentence.inner_text()


@pytest.fixture
def other_adapter(server: ComfyServer) -> tuple[str, str]:
    """An adapter of another UNet, and its MLLM, among the server's models."""
    models = server.base / "models"
    for link, target in ((models / "easyref" / OTHER, ADAPTER), (models / "LLM" / "other", MLLM)):
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(target)
    assert OTHER in json.dumps(server.get_json("/object_info/EasyRefLoader"))
    return OTHER, "other"
