"""The template for the graph editor: the same graph as its API form, and laid out to be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from easyref_core.demo.comfy_server import ComfyServer
from easyref_core.demo.workflow import Graph, load_workflow

TITLE_HEIGHT = 30
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def template(pack: Path) -> dict[str, Any]:
    path = pack / "workflows" / "easyref_character.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def nodes(template: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {node["id"]: node for node in template["nodes"]}


def widgets(node_info: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """A node's widgets in the editor's order, with the number of values each one stores."""
    for kind in ("required", "optional"):
        for name in node_info["input_order"].get(kind, ()):
            kind_of, *rest = node_info["input"][kind][name]
            options = rest[0] if rest else {}
            if isinstance(kind_of, list) or kind_of in WIDGETS:
                companion = options.get("control_after_generate") or options.get("image_upload")
                yield name, 2 if companion else 1


def api_form(template: dict[str, Any], object_info: Mapping[str, Any]) -> Graph:
    """What the editor would queue."""
    sources = {link[0]: [str(link[1]), link[2]] for link in template["links"]}
    graph: Graph = {}
    for node in template["nodes"]:
        if node["type"] not in object_info:  # notes
            continue
        inputs: dict[str, Any] = {}
        values = list(node["widgets_values"])
        for name, stored in widgets(object_info[node["type"]]):
            inputs[name] = values[0]
            del values[:stored]
        assert not values, f"{node['type']} has {len(values)} values too many"
        for slot in node["inputs"]:
            if slot.get("link") is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def test_template_and_api_form_describe_one_graph(
    server: ComfyServer, template: dict[str, Any]
) -> None:
    object_info = server.get_json("/object_info")
    expected = {
        node_id: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for node_id, node in load_workflow("easyref_character").items()
    }
    assert api_form(template, object_info) == expected


def test_titles_agree(server: ComfyServer, nodes: dict[int, dict[str, Any]]) -> None:
    object_info = server.get_json("/object_info")
    for node_id, node in load_workflow("easyref_character").items():
        shown = nodes[int(node_id)].get("title") or object_info[node["class_type"]]["display_name"]
        assert shown == node["_meta"]["title"]


def test_links_agree_with_the_slots_at_both_ends(
    template: dict[str, Any], nodes: dict[int, dict[str, Any]]
) -> None:
    for link_id, source, out_slot, target, in_slot, kind in template["links"]:
        output, entry = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert link_id in output["links"]
        assert link_id == entry["link"]
        assert output["type"] == entry["type"] == kind
    ids = [link[0] for link in template["links"]]
    assert len(set(ids)) == len(ids)
    assert template["last_link_id"] == max(ids)
    assert template["last_node_id"] == max(nodes)


def test_every_loader_names_its_file_and_where_to_get_it(
    server: ComfyServer, nodes: dict[int, dict[str, Any]]
) -> None:
    loaders = [
        n for n in nodes.values() if n["type"] in {"CheckpointLoaderSimple", "EasyRefLoader"}
    ]
    assert len(loaders) == 2
    folders = server.get_json("/models")
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0]
        assert model["directory"] in folders
        assert model["url"].startswith("https://")
        assert model["url"].endswith(f"/{model['name']}")


def box(node: dict[str, Any]) -> Box:
    x, y = node["pos"]
    width, height = node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def test_nodes_do_not_overlap(nodes: dict[int, dict[str, Any]]) -> None:
    for first, second in combinations(nodes.values(), 2):
        a, b = box(first), box(second)
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{first['type']} and {second['type']} overlap"


def test_every_node_but_the_note_lies_in_one_group(
    template: dict[str, Any], nodes: dict[int, dict[str, Any]]
) -> None:
    for node in nodes.values():
        left, top, right, bottom = box(node)
        around = [
            group["title"]
            for group in template["groups"]
            for x, y, width, height in [group["bounding"]]
            if x <= left and y <= top and right <= x + width and bottom <= y + height
        ]
        assert len(around) == (0 if node["type"] == "MarkdownNote" else 1)
