"""The templates in ComfyUI's page: the graph it queues, and the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_page import MODES, NODES, ComfyPage
from page_layout import covered

from workshop.demo.workflow import WORKFLOWS, Graph, load_workflow

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
TOO_SMALL = """() => app.graph.nodes.filter((node) => node.size[1] + 1 < node.computeSize()[1])
    .map((node) => `${node.type}: ${node.size}, needs ${node.computeSize()}`)"""

# For each note, by how many pixels its text is longer than its node.
CUT_OFF = """() => [...document.querySelectorAll(".tiptap, .comfy-markdown-content")]
    .filter((e) => e.checkVisibility()).map((e) => Math.max(0, e.scrollHeight - e.clientHeight))"""

# Classes that the page does not know; such nodes have no widgets and slots.
UNKNOWN = """() => app.graph.nodes.map((node) => node.isSubgraphNode?.() ? "" : node.type)
    .filter((type) => type && !(type in LiteGraph.registered_node_types))"""

LOADERS = {"CheckpointLoaderSimple", "EasyRefLoader", "ControlNetLoader", "LoraLoader"}
IN_ERROR = "() => app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type)"
# Loaders whose missing file is not reported: newer pages mark the loader, older ones open a
# dialog that names the file.
UNREPORTED = """() => app.graph.nodes
    .flatMap((node) => (node.properties.models ?? []).map(({name}) => [node, name]))
    .filter(([node, name]) => !node.has_errors
        && ![...document.querySelectorAll("[role=dialog]")].some((e) => e.innerText.includes(name)))
    .map(([node]) => node.type)"""


# For each of ComfyUI's own classes, its inputs.
INPUTS = """async () => {
    const nodes = Object.entries(await (await fetch("/object_info")).json());
    return Object.fromEntries(nodes.filter(([type]) => !type.startsWith("EasyRef"))
        .map(([type, node]) => [type, Object.values(node.input).flatMap(Object.keys)]));
}"""


def plain(graph: dict[str, Any], inputs: dict[str, list[str]]) -> Graph:
    """A graph with only classes and inputs, without titles.

    Older pages also send text fields of their own, which they add to some of ComfyUI's nodes.
    """
    return {
        node_id: {
            "class_type": node["class_type"],
            "inputs": {
                name: value
                for name, value in node["inputs"].items()
                if name in inputs.get(node["class_type"], node["inputs"])
            },
        }
        for node_id, node in graph.items()
    }


def test_the_page_queues_the_api_form_of_each_template(page: ComfyPage) -> None:
    inputs = page.evaluate(INPUTS)
    for name in NAMES:
        page.load_template(name)
        assert plain(page.prompt(), inputs) == plain(load_workflow(name), inputs), name
        assert page.evaluate(TOO_SMALL) == [], name


@pytest.mark.parametrize("mode", MODES)
def test_every_template_has_no_overlaps_and_lacks_only_models(
    page: ComfyPage, screenshots: Path
) -> None:
    """As on a fresh machine: there is no model, and no picture but ComfyUI's own example."""
    for name in NAMES:
        page.load_template(name)
        page.wait_for(lambda: not page.evaluate(UNREPORTED), lambda: page.evaluate(UNREPORTED))
        page.close_dialogs()
        page.fit_view()
        page.screenshot(screenshots, name)
        assert page.evaluate(UNKNOWN) == [], name
        assert set(page.evaluate(IN_ERROR)) <= LOADERS, name
        assert covered(page) == [], name
        page.look_at("MarkdownNote")  # at 100 %
        page.wait_for(lambda: page.evaluate(CUT_OFF))
        assert page.evaluate(CUT_OFF) == [0], name


def test_the_blueprint_is_a_subgraph_with_its_settings(page: ComfyPage, pack: Path) -> None:
    page.load(json.loads((pack / "subgraphs" / "EasyRef.json").read_text(encoding="utf-8")))
    page.tab.wait_for_function(NODES, arg=1)
    (node,) = page.evaluate(
        """() => app.graph.nodes.map((node) => ({
            inside: node.subgraph?.nodes.map((inner) => inner.type).sort(),
            settings: Object.fromEntries((node.widgets ?? []).map((w) => [w.name, w.value])),
        }))"""
    )
    assert node["inside"] == ["EasyRefApply", "EasyRefEncode", "EasyRefLoader"]
    wanted = {"prompt": "", "adapter": "model.safetensors", "mllm": "from adapter", "weight": 1}
    assert {name: node["settings"].get(name) for name in wanted} == wanted
