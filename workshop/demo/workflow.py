"""The shipped workflows in API form, and the one switch that runs them on the demo models."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from easyref_core.errors import EasyRefError

from ..comfyui.find_comfyui import PACK

Graph = dict[str, dict[str, Any]]

WORKFLOWS = PACK / "workflows"
DEMO_NODE = "demo"
EXAMPLE = "example.png"  # the file in the templates' Load Image nodes
_SWITCH = "EasyRefDemoModels"
_SLOT = "images.image_"
_LATENT = "latent"  # its input that is not muted with the models

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
    """The same graph without its model loaders, on the demo models.

    In a template this is what muting the loaders gives: all models before EasyRef Demo Models go,
    and only a latent stays connected, if there was one. A graph without this node gets one.
    """
    switches = [n for n, node in graph.items() if node["class_type"] == _SWITCH]
    switch = switches[0] if switches else DEMO_NODE
    outputs = {
        (node_id, slot): stand_in
        for node_id, node in graph.items()
        for slot, stand_in in enumerate(_STAND_INS.get(node["class_type"], ()))
    }
    gone = {node_id for node_id, _ in outputs} | _models_before(graph, switches)
    changed = {node_id: copy.deepcopy(n) for node_id, n in graph.items() if node_id not in gone}
    if gone and not switches:
        changed[switch] = {"class_type": _SWITCH, "inputs": {}}
    for node_id, node in changed.items():
        for name, value in [*node["inputs"].items()]:
            if not _is_link(value) or value[0] not in gone:
                continue
            if node_id == switch:
                del node["inputs"][name]
            else:
                node["inputs"][name] = [switch, outputs[tuple(value)]]
    return changed


def _models_before(graph: Graph, switches: Sequence[str]) -> set[str]:
    """All nodes whose outputs reach a switch, but for those that make its latent."""
    found: set[str] = set()
    waiting = [*switches]
    while waiting:
        node_id = waiting.pop()
        for name, value in graph[node_id]["inputs"].items():
            stays = node_id in switches and name == _LATENT
            if _is_link(value) and not stays and value[0] not in found:
                found.add(value[0])
                waiting.append(value[0])
    return found


def _is_link(value: Any) -> bool:
    return isinstance(value, list)


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


def set_prompts(graph: Graph, prompt: str, negative: str) -> Graph:
    """The same graph with other texts."""
    changed = set_inputs(graph, "PrimitiveStringMultiline", value=prompt)
    for node in changed.values():
        # The positive text comes over a link.
        if node["class_type"] == "CLIPTextEncode" and isinstance(node["inputs"]["text"], str):
            node["inputs"]["text"] = negative
    return changed


def without_easyref(graph: Graph) -> Graph:
    """The same graph without EasyRef Apply nodes: the prompt alone."""
    return without_nodes(graph, "EasyRefApply", "model")


def without_nodes(graph: Graph, class_type: str, passed: str) -> Graph:
    """The same graph without the nodes of a class; their input `passed` goes on in their place."""
    gone = {
        node_id: node["inputs"][passed]
        for node_id, node in graph.items()
        if node["class_type"] == class_type
    }
    changed = {node_id: copy.deepcopy(n) for node_id, n in graph.items() if node_id not in gone}
    for node in changed.values():
        for name, value in node["inputs"].items():
            while _is_link(value) and value[0] in gone:
                value = gone[value[0]]
            node["inputs"][name] = value
    return changed


def with_references(graph: Graph, *groups: Sequence[str]) -> Graph:
    """The same graph with these files, by Load Image nodes, in its EasyRef References nodes.

    Args:
        groups: the files of each EasyRef References node, in the nodes' order.

    Raises:
        EasyRefError: the graph has another number of these nodes.
    """
    gathering = [n for n, node in graph.items() if node["class_type"] == "EasyRefReferences"]
    if len(gathering) != len(groups):
        raise EasyRefError(
            f"The graph has {len(gathering)} EasyRef References, and there are pictures for "
            f"{len(groups)}."
        )
    before = {
        value[0]
        for node_id in gathering
        for name, value in graph[node_id]["inputs"].items()
        if name.startswith(_SLOT)
    }
    changed = {node_id: copy.deepcopy(n) for node_id, n in graph.items() if node_id not in before}
    count = 0
    for node_id, names in zip(gathering, groups, strict=True):
        kept = {n: v for n, v in graph[node_id]["inputs"].items() if not n.startswith(_SLOT)}
        changed[node_id]["inputs"] = kept
        for number, name in enumerate(names, 1):
            count += 1
            changed[f"reference_{count}"] = {"class_type": "LoadImage", "inputs": {"image": name}}
            kept[f"{_SLOT}{number}"] = [f"reference_{count}", 0]
    return changed


def with_pictures(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The same graph with other files in its Load Image nodes, old name -> new name."""
    changed = copy.deepcopy(graph)
    for node in changed.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = names.get(node["inputs"]["image"], node["inputs"]["image"])
    return changed
