"""The shipped workflows in API form, and changes to them: demo models, pictures, prompts."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from easyref_core.demo_set import score_model
from easyref_core.errors import EasyRefError

from ..comfyui.find_comfyui import PACK

Graph = dict[str, dict[str, Any]]

WORKFLOWS = PACK / "workflows"
DEMO_NODE = "demo"
EXAMPLE = "example.png"  # the file in the templates' Load Image nodes
_SLOT = "images.image_"
_SCORE = "EasyRefScore"
_SIDE = 128  # of the demo models' pictures, in pixels

# Loader -> which output of EasyRef Demo Models replaces each of its outputs.
_REPLACED: Mapping[str, tuple[int, ...]] = {
    "CheckpointLoaderSimple": (0, 1, 2),  # model, clip, vae
    "EasyRefLoader": (3,),
    "ControlNetLoader": (4,),
}


def load_workflow(name: str) -> Graph:
    """A workflow of `workflows/api`, by its file name without `.json`."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def use_demo_models(graph: Graph) -> Graph:
    """The same graph on the demo models, without LoRAs, with one latent of the demo's picture size.

    All loaders are replaced by one EasyRef Demo Models, `DEMO_NODE`. Scores are left out where the
    demo has no models for them.
    """
    changed = without_nodes(graph, "LoraLoader", "model", "clip")
    scores = {node_id for node_id, node in graph.items() if node["class_type"] == _SCORE}
    if all(map(score_model, ("clip", "dino"))):
        for node_id in scores:
            changed[node_id]["inputs"] |= {"clip_model": "demo", "dino_model": "demo"}
    else:
        changed = {
            n: node for n, node in changed.items() if n not in scores | _fed_by(graph, scores)
        }
    outputs = {
        (node_id, slot): [DEMO_NODE, output]
        for node_id, node in graph.items()
        for slot, output in enumerate(_REPLACED.get(node["class_type"], ()))
    }
    for node_id in {node_id for node_id, _ in outputs}:
        del changed[node_id]
    for node in changed.values():
        for name, value in node["inputs"].items():
            if _is_link(value):
                node["inputs"][name] = outputs.get(tuple(value), value)
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"] |= {"width": _SIDE, "height": _SIDE, "batch_size": 1}
    if outputs:
        changed[DEMO_NODE] = {"class_type": "EasyRefDemoModels", "inputs": {}}
    return changed


def _is_link(value: Any) -> bool:
    return isinstance(value, list)


def _fed_by(graph: Graph, sources: Set[str]) -> set[str]:
    """Ids of the nodes that a link of one of these leads to."""
    return {
        node_id
        for node_id, node in graph.items()
        if any(_is_link(value) and value[0] in sources for value in node["inputs"].values())
    }


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
    """The same graph with other prompts."""
    changed = set_inputs(graph, "PrimitiveStringMultiline", value=prompt)
    for node in changed.values():
        # The positive prompt is a link.
        if node["class_type"] == "CLIPTextEncode" and isinstance(node["inputs"]["text"], str):
            node["inputs"]["text"] = negative
    return changed


def with_identity(graph: Graph, weight: float, start: float) -> Graph:
    """The same graph with an EasyRef Identity of its references, between EasyRef Apply and sampler.

    Raises:
        EasyRefError: there is not one node of each of these classes.
    """
    changed = copy.deepcopy(graph)
    sampler, apply, references, decode = (
        only_node(graph, name)
        for name in ("KSampler", "EasyRefApply", "EasyRefReferences", "VAEDecode")
    )
    inputs = {
        "model": graph[sampler]["inputs"]["model"],
        "vae": graph[decode]["inputs"]["vae"],
        "references": [references, 0],
        "easyref": graph[apply]["inputs"]["easyref"],
        "weight": weight,
        "start_percent": start,
        "end_percent": 1.0,
        "reuse_steps": 1,
    }
    changed["identity"] = {"class_type": "EasyRefIdentity", "inputs": inputs}
    changed[sampler]["inputs"]["model"] = ["identity", 0]
    return changed


def without_easyref(graph: Graph) -> Graph:
    """The same graph without EasyRef Apply nodes: the prompt alone."""
    return without_nodes(graph, "EasyRefApply", "model")


def without_nodes(graph: Graph, class_type: str, *passed: str) -> Graph:
    """The same graph without the nodes of a class.

    Args:
        passed: for each of their outputs, the input that replaces it.
    """
    removed = {
        node_id: [node["inputs"][name] for name in passed]
        for node_id, node in graph.items()
        if node["class_type"] == class_type
    }
    changed = {node_id: copy.deepcopy(n) for node_id, n in graph.items() if node_id not in removed}
    for node in changed.values():
        for name, value in node["inputs"].items():
            while _is_link(value) and value[0] in removed:
                value = removed[value[0]][value[1]]
            node["inputs"][name] = value
    return changed


def with_references(graph: Graph, *groups: Sequence[str]) -> Graph:
    """The same graph with these files, by Load Image nodes, in its EasyRef References nodes.

    Args:
        groups: the files of each EasyRef References node, in the nodes' order.

    Raises:
        EasyRefError: the graph has another number of these nodes.
    """
    references = [n for n, node in graph.items() if node["class_type"] == "EasyRefReferences"]
    if len(references) != len(groups):
        raise EasyRefError(
            f"The graph has {len(references)} EasyRef References, and there are pictures for "
            f"{len(groups)}."
        )
    changed = copy.deepcopy(graph)
    count = 0
    for node_id, names in zip(references, groups, strict=True):
        inputs = changed[node_id]["inputs"]
        for number, name in enumerate(names, 1):
            count += 1
            changed[f"reference_{count}"] = {"class_type": "LoadImage", "inputs": {"image": name}}
            inputs[f"{_SLOT}{number}"] = [f"reference_{count}", 0]
    return changed


def with_pictures(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The same graph with other files in its Load Image nodes, old name -> new name."""
    changed = copy.deepcopy(graph)
    for node in changed.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = names.get(node["inputs"]["image"], node["inputs"]["image"])
    return changed
