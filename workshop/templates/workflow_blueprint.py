"""The blueprint EasyRef: a subgraph that the editor lists among nodes to add.

ComfyUI reads blueprints of a node pack from its folder `subgraphs`; a file's name is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .workflow_editor import Box, Template, editor_form
from .workflow_graph import Graph, ObjectInfo, Subgraph
from .workflow_parts import ADAPTER, SDXL
from .workflow_subgraph import with_subgraph

_DESCRIPTION = (
    "EasyRef Loader, Encode and Apply in one: a model steered by what the reference pictures "
    "have in common. Open it to change any part."
)
_SEARCH_WORDS = ["reference images", "consistent character", "style reference", "ip adapter"]


def blueprint(object_info: ObjectInfo, versions: Mapping[str, str]) -> dict[str, Any]:
    """A graph of the one subgraph alone, with nothing linked to it."""
    template, subgraph = _chain()
    form = with_subgraph(editor_form(template, object_info, versions), subgraph, object_info)
    (definition,) = form["definitions"]["subgraphs"]
    (outer,) = (node for node in form["nodes"] if node["type"] == definition["id"])
    definition |= {"id": form["id"], "description": _DESCRIPTION, "category": "EasyRef"}
    outer |= {"id": 1, "type": definition["id"], "pos": [0, 0], "order": 0}
    for slot in outer["inputs"]:
        slot["link"] = None
    for slot in outer["outputs"]:
        slot["links"] = None
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [outer],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintSearchAliases": _SEARCH_WORDS},
    }


def _chain() -> tuple[Template, Subgraph]:
    graph = Graph()
    # Left outside: it is there because EasyRef Apply cannot do without a model.
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=SDXL.name)
    loader = graph.add("EasyRefLoader", models=(ADAPTER,), adapter=ADAPTER.name)
    encoded = graph.add("EasyRefEncode", easyref=loader)
    applied = graph.add("EasyRefApply", model=checkpoint, easyref=loader, tokens=encoded)
    # Graphs made with the blueprint hold its slots in this order.
    subgraph = Subgraph(
        "EasyRef",
        [loader, encoded, applied],
        {
            "references": [(encoded, "references")],
            "prompt": [(encoded, "prompt")],
            "model": [(applied, "model")],
            "images": [(encoded, "images")],
            "adapter": [(loader, "adapter")],
            "mllm": [(loader, "mllm")],
            "weight": [(applied, "weight")],
            "start_percent": [(applied, "start_percent")],
        },
        {"model": applied.out()},
    )
    box = Box("EasyRef", [graph.nodes])
    return Template("blueprint", graph, [[box]], "", subgraph), subgraph
