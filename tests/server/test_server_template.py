"""The templates for the graph editor: the same graphs as their API forms, laid out to be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from unpacked import unpacked

from workshop.comfyui.comfy_server import PACK_NAME, ComfyServer
from workshop.demo.workflow import WORKFLOWS, Graph, load_workflow, use_demo_models

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
EXPECTED = {"character", "style", "controlnet", "two_people", "curves_and_layers", "tokens"}
EXPECTED |= {"with_lora", "quick", "subgraph"}
MODELS_BOX = "1. Models"
LOADERS = {"CheckpointLoaderSimple", "EasyRefLoader", "ControlNetLoader", "LoraLoader"}
TITLE_HEIGHT = 30
ROW, WIDGET = 20, 24
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

Box = tuple[float, float, float, float]


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def template(pack: Path, name: str) -> dict[str, Any]:
    path = pack / "workflows" / f"{name}.json"
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
    """What the editor would queue, with a node in a subgraph under its own number."""
    template = unpacked(template)
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


def plain(graph: Graph) -> Graph:
    """A graph without what only people read."""
    return {
        node_id: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for node_id, node in graph.items()
    }


def test_every_use_has_its_template() -> None:
    assert {name.removeprefix("easyref_") for name in NAMES} == EXPECTED


def test_template_and_api_form_describe_one_graph(
    server: ComfyServer, name: str, template: dict[str, Any]
) -> None:
    object_info = server.get_json("/object_info")
    assert api_form(template, object_info) == plain(load_workflow(name))


def test_muting_the_loaders_gives_the_demo(
    server: ComfyServer, name: str, template: dict[str, Any]
) -> None:
    """As the editor does it: muted nodes go, and links from them."""
    graph = api_form(template, server.get_json("/object_info"))
    muted = {
        str(node["id"]) for node in template["nodes"] if around(template, node) == [MODELS_BOX]
    }
    assert {graph[n]["class_type"] for n in muted} <= LOADERS
    left = {
        node_id: {
            "class_type": node["class_type"],
            "inputs": {
                key: value
                for key, value in node["inputs"].items()
                if not (isinstance(value, list) and value[0] in muted)
            },
        }
        for node_id, node in graph.items()
        if node_id not in muted
    }
    assert left == plain(use_demo_models(load_workflow(name)))
    assert not LOADERS & {node["class_type"] for node in left.values()}


def test_titles_agree(server: ComfyServer, name: str, template: dict[str, Any]) -> None:
    """Where a template gives none, those of our own nodes; ComfyUI's change with its version."""
    object_info = server.get_json("/object_info")
    nodes = {node["id"]: node for node in unpacked(template)["nodes"]}
    for node_id, node in load_workflow(name).items():
        title = nodes[int(node_id)].get("title")
        info = object_info[node["class_type"]]
        if title or info["python_module"] == f"custom_nodes.{PACK_NAME}":
            assert node["_meta"]["title"] == (title or info["display_name"])


def test_links_agree_with_the_slots_at_both_ends(
    template: dict[str, Any], nodes: dict[int, dict[str, Any]]
) -> None:
    for link_id, source, out_slot, target, in_slot, kind in template["links"]:
        output, entry = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert link_id in output["links"]
        assert link_id == entry["link"]
        assert output["type"] == entry["type"] == kind


def test_numbers_of_nodes_and_links_are_used_once(template: dict[str, Any]) -> None:
    graphs = [template, *template.get("definitions", {}).get("subgraphs", [])]
    nodes = [node["id"] for graph in graphs for node in graph["nodes"]]
    links = [link[0] for link in template["links"]]
    links += [link["id"] for graph in graphs[1:] for link in graph["links"]]
    for ids, last in ((nodes, "last_node_id"), (links, "last_link_id")):
        assert len(set(ids)) == len(ids)
        assert template[last] == max(ids)


def test_every_loader_names_its_file_and_where_to_get_it(
    server: ComfyServer, nodes: dict[int, dict[str, Any]]
) -> None:
    loaders = [n for n in nodes.values() if n["type"] in LOADERS]
    assert len(loaders) >= 2
    folders = server.get_json("/models")
    (note,) = (n["widgets_values"][0] for n in nodes.values() if n["type"] == "MarkdownNote")
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] in node["widgets_values"]
        assert model["directory"] in folders
        assert model["url"].startswith("https://")
        assert model["url"].endswith(f"/{model['name']}")
        page = model["url"].removesuffix(f"/resolve/main/{model['name']}")
        for said in (f"[{model['name']}]({model['url']})", f"]({page})"):
            assert said in note
        assert f"`models/{model['directory']}`" in note


def test_the_note_says_what_to_do(nodes: dict[int, dict[str, Any]]) -> None:
    (note,) = (n for n in nodes.values() if n["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert note["title"] == "How to use"
    for part in ("**Models**", "**Steps**\n1. ", "**If the result is off**\n- ", "Never**"):
        assert part in text
    named = set(re.findall(r"\*\*Set Group Nodes to (\w+)\*\*", text))
    assert named == {"Never", "Always"}


def box(node: dict[str, Any]) -> Box:
    x, y = node["pos"]
    width, height = node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def test_nodes_do_not_overlap(nodes: dict[int, dict[str, Any]]) -> None:
    for first, second in combinations(nodes.values(), 2):
        a, b = box(first), box(second)
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{first['type']} and {second['type']} overlap"


def test_nodes_are_large_enough_for_what_is_in_them(
    server: ComfyServer, nodes: dict[int, dict[str, Any]]
) -> None:
    object_info = server.get_json("/object_info")
    for node in nodes.values():
        sockets = [slot for slot in node["inputs"] if "widget" not in slot]
        rows = max(len(sockets), len(node["outputs"]), 1)
        if node["type"] in object_info:
            lines = sum(stored for _, stored in widgets(object_info[node["type"]]))
        else:  # a subgraph's
            lines = len(node["inputs"]) - len(sockets)
        assert node["size"][1] >= rows * ROW + lines * WIDGET, node["type"]


def around(template: dict[str, Any], node: dict[str, Any]) -> list[str]:
    """The titles of the boxes that hold a node entirely."""
    left, top, right, bottom = box(node)
    return [
        group["title"]
        for group in template["groups"]
        for x, y, width, height in [group["bounding"]]
        if x <= left and y <= top and right <= x + width and bottom <= y + height
    ]


def test_every_node_but_the_note_lies_in_one_group(
    template: dict[str, Any], nodes: dict[int, dict[str, Any]]
) -> None:
    for node in nodes.values():
        assert len(around(template, node)) == (0 if node["type"] == "MarkdownNote" else 1)


def test_groups_do_not_overlap(template: dict[str, Any]) -> None:
    boxes = [(x, y, x + w, y + h) for g in template["groups"] for x, y, w, h in [g["bounding"]]]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
