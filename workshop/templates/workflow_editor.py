"""A template as ComfyUI's graph editor keeps it: nodes placed in boxes, links, a note.

The boxes stand in stages from left to right; in a stage one lies below the other, and in a box the
nodes stand in columns. Positions follow from the nodes' sizes, and these from their inputs.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .workflow_graph import (
    WIDGETS,
    Graph,
    Node,
    ObjectInfo,
    Output,
    Subgraph,
    input_values,
    schema_inputs,
)

# The editor's own measures.
_TITLE, _ROW, _WIDGET, _PADDING = 30, 20, 24, 14
_BOX_TITLE = 50
EDGE = 20  # between a box and what is in it
_GAP, _BELOW, _STAGE_GAP = 30, 50, 30
# Nodes 2.0 draws the same node higher: a widget's line, a text that comes over a link, the pack's
# name below nodes of packs, and a line below a loader whose file is missing.
_NEW_WIDGET, _NEW_LINKED_TEXT, _NEW_PACK, _NEW_ISSUE = 28, 68, 24, 32

_NOTE_WIDTH = 400
_WIDTHS = {
    "LoadImage": 280,
    "SaveImage": 460,
    "PrimitiveStringMultiline": 360,
    "CLIPTextEncode": 360,
    "EasyRefReferences": 350,
    "SolidMask": 240,
    "MaskComposite": 240,
    "InvertMask": 240,
}
_WIDTH = 340
# Pictures, texts of several lines and the gallery take room that no schema tells of.
_EXTRA_HEIGHT = {"LoadImage": 256, "SaveImage": 460, "EasyRefReferences": 210}
_TEXT_HEIGHT = 90

EASYREF_COLOURS = {"color": "#233", "bgcolor": "#355"}
_POSITIVE = ("#232", "#353")
_NEGATIVE = ("#322", "#533")
_NOTE = ("#432", "#653")
_BOX, _EASYREF_BOX = "#3f789e", "#88a"


@dataclass(frozen=True)
class Box:
    """A group box of the editor.

    Attributes:
        columns: nodes from left to right, in each column from top to bottom.
        own: whether EasyRef's own nodes are what it is about, which gives it another colour.
    """

    title: str
    columns: Sequence[Sequence[Node]]
    own: bool = False


@dataclass(frozen=True)
class Template:
    """A graph with its place in the editor.

    Attributes:
        name: of its files.
        stages: from left to right, each a list of boxes from top to bottom.
        note: Markdown that stands left of everything.
        subgraph: nodes that are to be shown as one; see `workflow_subgraph`.
    """

    name: str
    graph: Graph
    stages: Sequence[Sequence[Box]]
    note: str
    subgraph: Subgraph | None = None


def editor_form(
    template: Template, object_info: ObjectInfo, versions: Mapping[str, str]
) -> dict[str, Any]:
    """The template's file for the editor, with all nodes side by side.

    Args:
        versions: "comfy-core" and "easyref" -> version.

    Raises:
        ValueError: a node stands in no box, or in two.
    """
    places, groups = _arrange(template, object_info)
    if sorted(places) != [node.number for node in template.graph.nodes]:
        raise ValueError(f"{template.name}: some nodes stand in no box")
    links = _links(template.graph, object_info)
    nodes = [
        _node(node, places[node.number], links, object_info[node.kind], versions)
        for node in template.graph.nodes
    ]
    last = len(nodes) + 1
    bottom = max(y + height for y, height in ((g["bounding"][1], g["bounding"][3]) for g in groups))
    nodes.append(_note(template.note, last, min(bottom, 900)))
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"easyref/{template.name}")),
        "revision": 0,
        "last_node_id": last,
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"ds": {"scale": 0.55, "offset": [_NOTE_WIDTH + 90, 130]}},
        "version": 0.4,
    }


def _arrange(
    template: Template, object_info: ObjectInfo
) -> tuple[dict[int, tuple[int, int, int]], list[dict[str, Any]]]:
    """Each node's place and width, and the boxes. A node alone in its box is as wide as the box."""
    places: dict[int, tuple[int, int, int]] = {}
    groups: list[dict[str, Any]] = []
    left = 0
    for boxes in template.stages:
        top, width = 0, max(_inner_width(box) for box in boxes)
        for box in boxes:
            alone = len(box.columns) == len(box.columns[0]) == 1
            x, lowest = left, top
            for column in box.columns:
                y = top
                for node in column:
                    if node.number in places:
                        raise ValueError(f"{template.name}: {node.kind} stands in two boxes")
                    places[node.number] = (x, y, width if alone else node_width(node))
                    bottom = y + _room(node, object_info[node.kind])
                    lowest = max(lowest, bottom)
                    y = bottom + _BELOW
                x += max(node_width(node) for node in column) + _GAP
            start = top - _TITLE - _BOX_TITLE
            bounding = [left - EDGE, start, width + 2 * EDGE, lowest + EDGE - start]
            groups.append(
                {
                    "id": len(groups) + 1,
                    "title": box.title,
                    "bounding": bounding,
                    "color": _EASYREF_BOX if box.own else _BOX,
                    "font_size": 24,
                    "flags": {},
                }
            )
            top = lowest + 2 * EDGE + _TITLE + _BOX_TITLE
        left += width + 2 * EDGE + _STAGE_GAP
    return places, groups


def _inner_width(box: Box) -> int:
    widths = [max(node_width(node) for node in column) for column in box.columns]
    return sum(widths) + _GAP * (len(widths) - 1)


def node_width(node: Node) -> int:
    return _WIDTHS.get(node.kind, _WIDTH)


def node_size(node: Node, info: Mapping[str, Any]) -> tuple[int, int]:
    """So large that everything in the node is seen on the classic canvas."""
    rows, lines, texts, linked = _content(node, info)
    # A text that comes over a link needs no room.
    height = rows * _ROW + lines * _WIDGET + (texts + 0.35 * linked) * _TEXT_HEIGHT + _PADDING
    return node_width(node), round(height + _EXTRA_HEIGHT.get(node.kind, 0))


def _room(node: Node, info: Mapping[str, Any]) -> int:
    """The height to be kept free: as high as the node is in Nodes 2.0, if that is more."""
    rows, lines, texts, linked = _content(node, info)
    height = rows * _ROW + lines * _NEW_WIDGET + linked * _NEW_LINKED_TEXT + _PADDING
    height += texts * _TEXT_HEIGHT + _EXTRA_HEIGHT.get(node.kind, 0)
    height += _NEW_PACK if node.kind.startswith("EasyRef") else 0
    height += _NEW_ISSUE if node.models else 0
    return max(height, node_size(node, info)[1])


def _content(node: Node, info: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Rows of sockets, lines of widgets, texts of several lines, and such texts over a link."""
    sockets, lines, texts, linked = 0, 0, 0, 0
    for name, type_of, options, _ in schema_inputs(info, node.inputs):
        if type_of not in WIDGETS:
            sockets += 1
        elif options.get("multiline") and isinstance(node.inputs.get(name), Output):
            linked += 1
        elif options.get("multiline"):
            texts += 1
        else:
            lines += 2 if _companion(options) is not None else 1
    return max(sockets, len(info["output"]), 1), lines, texts, linked


def _companion(options: Mapping[str, Any]) -> str | None:
    """What the editor stores behind a widget's own value, if anything."""
    if options.get("control_after_generate"):
        return "fixed"
    return "image" if options.get("image_upload") else None


def _links(graph: Graph, object_info: ObjectInfo) -> list[list[Any]]:
    """Number, source, its slot, target, its slot, type: sorted by target."""
    links: list[list[Any]] = []
    for node in graph.nodes:
        for slot, (name, _) in enumerate(_sockets(node, object_info[node.kind])):
            value = node.inputs.get(name)
            if isinstance(value, Output):
                kind = object_info[value.node.kind]["output"][value.slot]
                number = len(links) + 1
                links.append([number, value.node.number, value.slot, node.number, slot, kind])
    return links


def _sockets(node: Node, info: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and entry in the file: the inputs that are no widgets, then widgets with a link."""
    sockets, widgets = [], []
    for name, kind, options, optional in schema_inputs(info, node.inputs):
        entry: dict[str, Any] = {"name": name, "type": kind}
        if "label" in options:
            entry["label"] = options["label"]
        if kind not in WIDGETS:
            sockets.append((name, entry | ({"shape": 7} if optional else {})))
        elif isinstance(node.inputs.get(name), Output):
            widgets.append((name, entry | {"widget": {"name": name}}))
    return sockets + widgets


def _node(
    node: Node,
    place: tuple[int, int, int],
    links: list[list[Any]],
    info: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    into = {link[4]: link for link in links if link[3] == node.number}
    inputs = [
        {**entry, "link": into[slot][0] if slot in into else None}
        for slot, (_, entry) in enumerate(_sockets(node, info))
    ]
    outputs = [
        {
            "name": name,
            "type": kind,
            "links": [link[0] for link in links if link[1:3] == [node.number, slot]],
        }
        for slot, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
    ]
    pack = "easyref" if node.kind.startswith("EasyRef") else "comfy-core"
    properties: dict[str, Any] = {
        "cnr_id": pack,
        "ver": versions[pack],
        "Node name for S&R": node.kind,
    }
    if node.models:
        properties["models"] = [
            {"name": model.name, "url": model.url, "directory": model.folder}
            for model in node.models
        ]
    made = {
        "id": node.number,
        "type": node.kind,
        "pos": list(place[:2]),
        "size": [place[2], node_size(node, info)[1]],
        "flags": {},
        "order": node.number - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        "title": node.title,
        "properties": properties,
        "widgets_values": _widget_values(node, info),
    }
    if node.title is None:
        del made["title"]
    return made | _colours(node)


def _widget_values(node: Node, info: Mapping[str, Any]) -> list[Any]:
    """The widgets' values in order, with what the editor stores behind some of them."""
    values = input_values(node, info)
    stored: list[Any] = []
    for name, kind, options, _ in schema_inputs(info):
        if kind in WIDGETS:
            value = values[name]
            if isinstance(value, Output):  # what is shown there is not used
                value = value.node.inputs.get("value", "")
            stored.append(value)
            if (companion := _companion(options)) is not None:
                stored.append(companion)
    return stored


def _colours(node: Node) -> dict[str, str]:
    if node.kind.startswith("EasyRef"):
        return EASYREF_COLOURS
    if node.kind in ("PrimitiveStringMultiline", "CLIPTextEncode"):
        pair = _NEGATIVE if "egative" in (node.title or "") else _POSITIVE
    else:
        return {}
    return dict(zip(("color", "bgcolor"), pair, strict=True))


def _note(text: str, number: int, height: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-_NOTE_WIDTH - 50, 0],
        "size": [_NOTE_WIDTH, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "How to use",
        "properties": {},
        "widgets_values": [text],
        **dict(zip(("color", "bgcolor"), _NOTE, strict=True)),
    }
