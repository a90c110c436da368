"""The templates in ComfyUI's own editor: what it queues, with the loaders on and muted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_page import NODES, ComfyPage

from easyref_core.demo.workflow import WORKFLOWS, Graph, load_workflow, use_demo_models

ALL = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
NAMES = [name for name in ALL if (WORKFLOWS / "api" / f"{name}.json").exists()]
TOO_SMALL = """() => app.graph.nodes.filter((node) => node.size[1] + 1 < node.computeSize()[1])
    .map((node) => `${node.type}: ${node.size}, needs ${node.computeSize()}`)"""

# A node that the page does not know has none of its widgets and slots.
UNKNOWN = """() => app.graph.nodes.map((node) => node.isSubgraphNode?.() ? "" : node.type)
    .filter((type) => type && !(type in LiteGraph.registered_node_types))"""


def plain(graph: dict[str, Any]) -> Graph:
    """A graph without what only people read."""
    return {
        node_id: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for node_id, node in graph.items()
    }


def test_the_editor_queues_the_api_form_and_its_demo_when_the_loaders_are_muted(
    page: ComfyPage,
) -> None:
    for name in NAMES:
        page.load_template(name)
        assert plain(page.prompt()) == plain(load_workflow(name))
        assert page.evaluate(TOO_SMALL) == [], name
        muted = page.mute_group("1. Models")
        assert {"CheckpointLoaderSimple", "EasyRefLoader"} <= set(muted)
        assert "EasyRefDemoModels" not in muted
        assert plain(page.prompt()) == plain(use_demo_models(load_workflow(name)))


def test_every_template_is_shown(page: ComfyPage, screenshots: Path) -> None:
    for name in ALL:
        page.load_template(name)
        page.fit_view()
        page.tab.screenshot(path=screenshots / f"{name}_{page.release}.png")
        assert page.evaluate(UNKNOWN) == [], name


def test_the_blueprint_is_a_subgraph_with_its_settings(page: ComfyPage, pack: Path) -> None:
    page.allow_requests()  # about the size of the adapter's file
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
