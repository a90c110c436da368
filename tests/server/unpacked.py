"""A template without its subgraph: the nodes inside stand beside the others, as they run."""

from __future__ import annotations

import copy
from typing import Any

# The subgraph's own ends, as the editor numbers them.
INPUT, OUTPUT = -10, -20
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def parts(template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one subgraph of a template, and the node that stands for it."""
    (definition,) = template["definitions"]["subgraphs"]
    (outer,) = (node for node in template["nodes"] if node["type"] == definition["id"])
    return definition, outer


def settings(node: dict[str, Any]) -> dict[str, Any]:
    """A node's widgets by name."""
    names = [slot["name"] for slot in node["inputs"] if slot.get("widget")]
    return dict(zip(names, node["widgets_values"], strict=True))


def unpacked(template: dict[str, Any]) -> dict[str, Any]:
    """The same graph without a subgraph. Settings shown outside take the place of those inside."""
    template = copy.deepcopy(template)
    if "definitions" not in template:
        return template
    definition, outer = parts(template)
    template["nodes"] = [n for n in template["nodes"] if n is not outer] + definition["nodes"]
    inside = [[link[key] for key in LINK] for link in definition["links"]]
    output = {link[4]: link[1:3] for link in inside if link[3] == OUTPUT}
    links = [link for link in inside if link[1] != INPUT and link[3] != OUTPUT]
    for number, *source, target, slot, kind in template["links"]:
        start = output[source[1]] if source[0] == outer["id"] else source
        if target == outer["id"]:
            ends = [link for link in inside if link[1:3] == [INPUT, slot]]
            links += [[link[0], *start, *link[3:]] for link in ends]
        else:
            links.append([number, *start, target, slot, kind])
    template["links"] = links
    _set_free_inputs(definition, outer, {link[0] for link in links})
    return template


def _set_free_inputs(definition: dict[str, Any], outer: dict[str, Any], linked: set[int]) -> None:
    nodes = {node["id"]: node for node in definition["nodes"]}
    shown = settings(outer)
    for link in definition["links"]:
        if link["origin_id"] != INPUT or link["id"] in linked:
            continue
        node = nodes[link["target_id"]]
        slot = node["inputs"][link["target_slot"]]
        slot["link"] = None
        if slot.get("widget"):
            value = shown[outer["inputs"][link["origin_slot"]]["name"]]
            node["widgets_values"] = [*(settings(node) | {slot["name"]: value}).values()]
