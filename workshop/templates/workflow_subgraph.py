"""Some nodes of a template put into a subgraph, as the editor does it: one node in their place.

What is inside has a graph of its own, in which two nodes without a class stand for what comes from
outside and what goes there.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from .workflow_editor import EASYREF_COLOURS, EDGE, node_size
from .workflow_graph import WIDGETS, Node, ObjectInfo, Subgraph, schema_inputs

Stored = dict[str, Any]
# Number, source, its slot, target, its slot, type.
Link = list[Any]

# The two ends inside, as the editor numbers and measures them.
_INPUTS, _OUTPUTS = -10, -20
_END_WIDTH, _END_GAP, _NODE_GAP, _ROW = 120, 100, 60, 20


def with_subgraph(form: Mapping[str, Any], subgraph: Subgraph, object_info: ObjectInfo) -> Stored:
    """The same template with some of its nodes in a subgraph.

    Numbers of nodes and links are used once in the whole file; nodes keep theirs.

    Args:
        form: the template for the editor, with all nodes side by side.

    Raises:
        ValueError: a link crosses the border where nothing is shown outside, or one that is shown
            would need several sources.
    """
    changed = copy.deepcopy(dict(form))
    nodes = {node["id"]: node for node in changed["nodes"]}
    inner = {
        node.number: _with_all_slots(nodes[node.number], object_info[node.kind])
        for node in subgraph.nodes
    }
    kind = str(uuid.uuid5(uuid.UUID(form["id"]), subgraph.name))
    outer = _outer_node(subgraph, inner, object_info, changed["last_node_id"] + 1, kind)
    outside, inside = _divided_links(form, subgraph, inner, outer["id"])
    changed["nodes"] = [*(node for node in nodes.values() if node["id"] not in inner), outer]
    _set_links(changed["nodes"], outside)
    _set_links(inner.values(), inside)
    _fit_box(changed["groups"], outer)
    changed |= {
        "last_node_id": outer["id"],
        "last_link_id": max(link[0] for link in (*outside, *inside)),
        "links": outside,
    }
    changed["definitions"] = {"subgraphs": [_definition(changed, subgraph, outer, inner, inside)]}
    return changed


def _with_all_slots(node: Stored, info: Mapping[str, Any]) -> Stored:
    """Inside a subgraph widgets have slots, too: any of them may be shown outside."""
    widgets = [
        {"name": name, "type": kind, "widget": {"name": name}, "link": None}
        | ({"shape": 7} if optional else {})
        for name, kind, _, optional in schema_inputs(info)
        if kind in WIDGETS
    ]
    sockets = [slot for slot in node["inputs"] if "widget" not in slot]
    return {**node, "inputs": [*sockets, *widgets]}


def _slot(node: Stored, name: str) -> int:
    return [slot["name"] for slot in node["inputs"]].index(name)


def _settings(node: Stored) -> dict[str, Any]:
    names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    return dict(zip(names, node["widgets_values"], strict=True))


def _divided_links(
    form: Mapping[str, Any], subgraph: Subgraph, inner: Mapping[int, Stored], outer: int
) -> tuple[list[Link], list[Link]]:
    """Links outside and inside; of one that crosses the border, both have a part."""
    links = _links_to_all_slots(form, inner)
    outside = [link for link in links if link[1] not in inner and link[3] not in inner]
    inside = [link for link in links if link[1] in inner and link[3] in inner]
    crossing = [link for link in links if (link[1] in inner) != (link[3] in inner)]
    fresh = count(form["last_link_id"] + 1)
    for place, (shown, ends) in enumerate(subgraph.inputs.items()):
        targets = [[node.number, _slot(inner[node.number], name)] for node, name in ends]
        given = [link for link in crossing if link[3:5] in targets]
        if given and (len(given) < len(ends) or any(g[1:3] != given[0][1:3] for g in given)):
            raise ValueError(f"{subgraph.name}: {shown} would need several sources")
        crossing = [link for link in crossing if link not in given]
        outside += [[*link[:3], outer, place, link[5]] for link in given[:1]]
        for number, slot in targets:
            kind = inner[number]["inputs"][slot]["type"]
            inside.append([next(fresh), _INPUTS, place, number, slot, kind])
    for place, (node, slot) in enumerate(subgraph.outputs.values()):
        kind = inner[node.number]["outputs"][slot]["type"]
        inside.append([next(fresh), node.number, slot, _OUTPUTS, place, kind])
        given = [link for link in crossing if link[1:3] == [node.number, slot]]
        crossing = [link for link in crossing if link not in given]
        outside += [[link[0], outer, place, *link[3:]] for link in given]
    if crossing:
        raise ValueError(f"{subgraph.name}: links cross its border where nothing is shown")
    return sorted(outside), inside


def _links_to_all_slots(form: Mapping[str, Any], inner: Mapping[int, Stored]) -> list[Link]:
    """The template's links; those to inner nodes say the slot's place among all of them."""
    before = {node["id"]: node["inputs"] for node in form["nodes"]}
    links = copy.deepcopy(form["links"])
    for link in links:
        target, entry = link[3:5]
        if target in inner:
            link[4] = _slot(inner[target], before[target][entry]["name"])
    return links


def _set_links(nodes: Iterable[Stored], links: Sequence[Link]) -> None:
    for node in nodes:
        for place, slot in enumerate(node["inputs"]):
            found = [link[0] for link in links if link[3:5] == [node["id"], place]]
            slot["link"] = found[0] if found else None
        for place, slot in enumerate(node["outputs"]):
            slot["links"] = [link[0] for link in links if link[1:3] == [node["id"], place]]


def _outer_node(
    subgraph: Subgraph,
    inner: Mapping[int, Stored],
    object_info: ObjectInfo,
    number: int,
    kind: str,
) -> Stored:
    """The node that is seen outside, at the place of the first one inside."""
    inputs, values = [], []
    for shown, ((node, name), *_) in subgraph.inputs.items():
        inside = inner[node.number]
        slot = inside["inputs"][_slot(inside, name)] | {"name": shown}
        if "widget" in slot:
            slot["widget"] = {"name": shown}
            values.append(_settings(inside)[name])
        inputs.append(slot)
    return {
        "id": number,
        "type": kind,
        "pos": min(node["pos"] for node in inner.values()),
        "size": _outer_size(subgraph, object_info),
        "flags": {},
        "order": min(node["order"] for node in inner.values()),
        "mode": 0,
        "inputs": inputs,
        "outputs": [
            {"name": shown, "type": inner[node.number]["outputs"][slot]["type"]}
            for shown, (node, slot) in subgraph.outputs.items()
        ],
        "title": subgraph.name,
        "properties": {},
        "widgets_values": values,
        **EASYREF_COLOURS,
    }


def _outer_size(subgraph: Subgraph, object_info: ObjectInfo) -> list[int]:
    """Measured as if the subgraph were a class of nodes."""
    shown = {
        outer_name: [kind, options]
        for outer_name, ((node, inner_name), *_) in subgraph.inputs.items()
        for name, kind, options, _ in schema_inputs(object_info[node.kind])
        if name == inner_name
    }
    info = {
        "input_order": {"required": [*shown]},
        "input": {"required": shown},
        "output": [*subgraph.outputs],
    }
    return list(node_size(Node(0, subgraph.name, None, {}), info))


def _fit_box(groups: Iterable[Stored], outer: Stored) -> None:
    """Let the box around the node end below it: what stood there before is inside now."""
    x, y = outer["pos"]
    for group in groups:
        left, top, width, height = group["bounding"]
        if left <= x < left + width and top <= y < top + height:
            group["bounding"][3] = y + outer["size"][1] + EDGE - top


def _definition(
    form: Mapping[str, Any],
    subgraph: Subgraph,
    outer: Stored,
    inner: Mapping[int, Stored],
    links: Sequence[Link],
) -> Stored:
    """The subgraph itself, its nodes in a row."""
    right = 0
    for order, node in enumerate(inner.values()):
        node |= {"pos": [right, 0], "order": order}
        right += node["size"][0] + _NODE_GAP
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return {
        "id": outer["type"],
        "version": 1,
        "state": {
            "lastGroupId": len(form["groups"]),
            "lastNodeId": form["last_node_id"],
            "lastLinkId": form["last_link_id"],
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": subgraph.name,
        "inputNode": _end(_INPUTS, -_END_GAP - _END_WIDTH, len(outer["inputs"])),
        "outputNode": _end(_OUTPUTS, right - _NODE_GAP + _END_GAP, len(outer["outputs"])),
        "inputs": _shown("inputs", outer, links),
        "outputs": _shown("outputs", outer, links),
        "widgets": [],
        "nodes": [*inner.values()],
        "groups": [],
        "links": [dict(zip(names, link, strict=True)) for link in links],
        "extra": {},
    }


def _end(number: int, left: int, slots: int) -> Stored:
    return {"id": number, "bounding": [left, 0, _END_WIDTH, (slots + 2) * _ROW]}


def _shown(side: str, outer: Stored, links: Sequence[Link]) -> list[Stored]:
    """What is shown outside as the subgraph lists it, with the links inside."""
    end, part = (_INPUTS, slice(1, 3)) if side == "inputs" else (_OUTPUTS, slice(3, 5))
    return [
        {
            "id": str(uuid.uuid5(uuid.UUID(outer["type"]), f"{side}/{slot['name']}")),
            **{key: slot[key] for key in ("name", "type", "shape") if key in slot},
            "linkIds": [link[0] for link in links if link[part] == [end, place]],
        }
        for place, slot in enumerate(outer[side])
    ]
