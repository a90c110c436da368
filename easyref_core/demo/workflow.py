"""The shipped workflows in API form, and the one switch that runs them on the demo models."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from ..errors import EasyRefError
from .find_comfyui import PACK

Graph = dict[str, dict[str, Any]]

WORKFLOWS = PACK / "workflows"
DEMO_NODE = "demo"

# Loader -> which output of EasyRef Demo Models stands for each of its outputs.
_STAND_INS: Mapping[str, tuple[int, ...]] = {
    "CheckpointLoaderSimple": (0, 1, 2),  # model, clip, vae
    "EasyRefLoader": (3,),
    "ControlNetLoader": (4,),
}


def load_workflow(name: str) -> Graph:
    """A workflow of `workflows/api`, by its file name without `.json`."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def use_demo_models(graph: Graph) -> Graph:
    """The same graph with one EasyRef Demo Models node in place of all model loaders."""
    outputs = {
        (node_id, slot): stand_in
        for node_id, node in graph.items()
        for slot, stand_in in enumerate(_STAND_INS.get(node["class_type"], ()))
    }
    replaced = {node_id for node_id, _ in outputs}
    changed = {node_id: copy.deepcopy(n) for node_id, n in graph.items() if node_id not in replaced}
    for node in changed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and tuple(value) in outputs:
                node["inputs"][name] = [DEMO_NODE, outputs[tuple(value)]]
    if replaced:
        changed[DEMO_NODE] = {"class_type": "EasyRefDemoModels", "inputs": {}}
    return changed


def only_node(graph: Graph, class_type: str) -> str:
    """Id of the one node of a class.

    Raises:
        EasyRefError: there is no such node, or more than one.
    """
    nodes = [node_id for node_id, node in graph.items() if node["class_type"] == class_type]
    if len(nodes) != 1:
        raise EasyRefError(f"The graph has {len(nodes)} nodes of class {class_type}, not one.")
    return nodes[0]


def set_inputs(graph: Graph, class_type: str, **inputs: Any) -> Graph:
    """The same graph with other values on its one node of a class; see `only_node`."""
    changed = copy.deepcopy(graph)
    changed[only_node(graph, class_type)]["inputs"].update(inputs)
    return changed


def without_easyref(graph: Graph) -> Graph:
    """The same graph with every EasyRef Apply taken out: what the prompt alone gives."""
    models = {
        node_id: node["inputs"]["model"]
        for node_id, node in graph.items()
        if node["class_type"] == "EasyRefApply"
    }
    changed = {node_id: copy.deepcopy(n) for node_id, n in graph.items() if node_id not in models}
    for node in changed.values():
        for name, value in node["inputs"].items():
            while isinstance(value, list) and value[0] in models:
                value = models[value[0]]
            node["inputs"][name] = value
    return changed


def with_pictures(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The same graph with other files in its Load Image nodes, old name -> new name."""
    changed = copy.deepcopy(graph)
    for node in changed.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = names.get(node["inputs"]["image"], node["inputs"]["image"])
    return changed
