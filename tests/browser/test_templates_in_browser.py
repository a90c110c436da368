"""The templates in ComfyUI's own editor: what it queues, with the loaders on and muted."""

from __future__ import annotations

from typing import Any

from comfy_page import ComfyPage

from easyref_core.demo.workflow import WORKFLOWS, Graph, load_workflow, use_demo_models

NAMES = sorted(p.stem for p in WORKFLOWS.glob("*.json") if (WORKFLOWS / "api" / p.name).exists())
# As the group's menu does it.
MUTE = """title => {
    const group = app.graph.groups.find((g) => g.title === title);
    group.recomputeInsideNodes();
    const muted = group.nodes ?? group._nodes;
    for (const node of muted) node.mode = LiteGraph.NEVER;
    return muted.map((node) => node.type).sort();
}"""
LOADED = "count => app.graph.nodes.length === count"
TOO_SMALL = """() => app.graph.nodes.filter((node) => node.size[1] + 1 < node.computeSize()[1])
    .map((node) => `${node.type}: ${node.size}, needs ${node.computeSize()}`)"""


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
        template = page.server.get_json(f"/api/workflow_templates/easyref/{name}.json")
        for node in template["nodes"]:
            # Of files that are missing the page asks their sites how large they are.
            node["properties"].pop("models", None)
        page.load(template)
        page.tab.wait_for_function(LOADED, arg=len(template["nodes"]))
        assert plain(page.prompt()) == plain(load_workflow(name))
        assert page.evaluate(TOO_SMALL) == [], name
        muted = page.evaluate(MUTE, "1. Models")
        assert {"CheckpointLoaderSimple", "EasyRefLoader"} <= set(muted)
        assert "EasyRefDemoModels" not in muted
        assert plain(page.prompt()) == plain(use_demo_models(load_workflow(name)))
