"""The template with EasyRef as a subgraph: taken apart, it is the whole chain of nodes. And the
blueprint, which is that subgraph for any graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from easyref_core.demo.comfy_server import ComfyServer

# The subgraph's own ends, as the editor numbers them.
INPUT, OUTPUT = -10, -20

Link = tuple[tuple[int, str], tuple[int, str]]


@pytest.fixture(scope="module")
def template(pack: Path) -> dict[str, Any]:
    path = pack / "workflows" / "easyref_subgraph.json"
    return json.loads(path.read_text(encoding="utf-8"))


def settings(node: dict[str, Any]) -> dict[str, Any]:
    """A node's widgets by name."""
    names = [slot["name"] for slot in node["inputs"] if slot.get("widget")]
    return dict(zip(names, node["widgets_values"], strict=True))


def taken_apart(template: dict[str, Any]) -> tuple[dict[int, str], set[Link]]:
    """Classes by node id, and links from (node, output) to (node, input), without the subgraph."""
    (definition,) = template["definitions"]["subgraphs"]
    (outer,) = (node for node in template["nodes"] if node["type"] == definition["id"])
    inner = {node["id"]: node for node in definition["nodes"]}
    nodes = {node["id"]: node for node in template["nodes"] if node is not outer} | inner

    def output(node: int, slot: int) -> tuple[int, str]:
        return node, nodes[node]["outputs"][slot]["name"]

    def entry(node: int, slot: int) -> tuple[int, str]:
        return node, nodes[node]["inputs"][slot]["name"]

    into: dict[int, list[tuple[int, str]]] = {}
    out_of: dict[int, tuple[int, str]] = {}
    links: set[Link] = set()
    for link in definition["links"]:
        start = (link["origin_id"], link["origin_slot"])
        end = (link["target_id"], link["target_slot"])
        if start[0] == INPUT:
            into.setdefault(start[1], []).append(entry(*end))
        elif end[0] == OUTPUT:
            out_of[end[1]] = output(*start)
        else:
            links.add((output(*start), entry(*end)))
    for _, source, out_slot, target, in_slot, _ in template["links"]:
        start = out_of[out_slot] if source == outer["id"] else output(source, out_slot)
        ends = into[in_slot] if target == outer["id"] else [entry(target, in_slot)]
        links |= {(start, end) for end in ends}
    return {number: node["type"] for number, node in nodes.items()}, links


def test_taken_apart_it_is_the_whole_chain(template: dict[str, Any]) -> None:
    classes, links = taken_apart(template)
    found = {(classes[a], out, classes[b], entry) for (a, out), (b, entry) in links}
    assert found >= {
        ("CheckpointLoaderSimple", "MODEL", "EasyRefApply", "model"),
        ("EasyRefLoader", "easyref", "EasyRefEncode", "easyref"),
        ("EasyRefLoader", "easyref", "EasyRefApply", "easyref"),
        ("LoadImage", "IMAGE", "EasyRefReferences", "image_1"),
        ("EasyRefReferences", "references", "EasyRefEncode", "references"),
        ("PrimitiveStringMultiline", "STRING", "EasyRefEncode", "prompt"),
        ("PrimitiveStringMultiline", "STRING", "CLIPTextEncode", "text"),
        ("EasyRefEncode", "tokens", "EasyRefApply", "tokens"),
        ("EasyRefApply", "model", "KSampler", "model"),
    }
    assert ("CheckpointLoaderSimple", "MODEL", "KSampler", "model") not in found


def test_the_subgraph_holds_the_whole_chain_and_shows_its_main_settings(
    template: dict[str, Any],
) -> None:
    (definition,) = template["definitions"]["subgraphs"]
    assert definition["name"] == "EasyRef"
    kinds = {node["type"] for node in definition["nodes"]}
    assert kinds == {"EasyRefLoader", "EasyRefEncode", "EasyRefApply"}
    shown = [slot["name"] for slot in definition["inputs"]]
    assert {"model", "references", "images", "prompt", "adapter", "mllm", "weight"} <= set(shown)
    (outer,) = (node for node in template["nodes"] if node["type"] == definition["id"])
    assert [slot["name"] for slot in outer["inputs"]] == shown
    values = [slot["name"] for slot in outer["inputs"] if slot.get("widget")]
    assert len(outer["widgets_values"]) == len(values)


def test_nodes_inside_have_the_slots_of_today(
    server: ComfyServer, template: dict[str, Any]
) -> None:
    (definition,) = template["definitions"]["subgraphs"]
    for node in definition["nodes"]:
        schema = server.get_json(f"/object_info/{node['type']}")[node["type"]]
        today = [name for names in schema["input_order"].values() for name in names]
        # Links name a slot by its place; widgets stand behind the slots.
        found = [slot["name"] for slot in node["inputs"]]
        assert sorted(found) == sorted(today)
        widgets = [slot["name"] for slot in node["inputs"] if slot.get("widget")]
        assert found[len(found) - len(widgets) :] == widgets
        for link in definition["links"]:
            if link["target_id"] == node["id"]:
                slot = node["inputs"][link["target_slot"]]
                assert slot["link"] == link["id"]


def test_settings_shown_outside_are_those_inside(template: dict[str, Any]) -> None:
    (definition,) = template["definitions"]["subgraphs"]
    (outer,) = (node for node in template["nodes"] if node["type"] == definition["id"])
    shown = settings(outer)
    assert len(shown) == len(outer["widgets_values"])
    inside = {name: value for node in definition["nodes"] for name, value in settings(node).items()}
    assert shown.items() <= inside.items()
    assert (shown["weight"], shown["mllm"]) == (1, "from adapter")


@pytest.fixture(scope="module")
def blueprint(pack: Path) -> dict[str, Any]:
    (path,) = (pack / "subgraphs").glob("*.json")  # where ComfyUI looks for them
    assert path.stem == "EasyRef"  # the name it shows
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_blueprint_is_one_free_subgraph_node(blueprint: dict[str, Any]) -> None:
    (definition,) = blueprint["definitions"]["subgraphs"]
    (node,) = blueprint["nodes"]
    assert node["type"] == definition["id"]
    assert blueprint["links"] == []
    assert {slot["link"] for slot in node["inputs"]} == {None}
    assert {slot["links"] for slot in node["outputs"]} == {None}


def test_the_blueprint_is_the_templates_subgraph_without_its_prompt(
    blueprint: dict[str, Any], template: dict[str, Any]
) -> None:
    (ours,) = blueprint["definitions"]["subgraphs"]
    (theirs,) = template["definitions"]["subgraphs"]
    assert ours["id"] != theirs["id"]  # both may be in one graph
    for part in ("inputs", "outputs", "links"):
        assert ours[part] == theirs[part]
    for our, their in zip(ours["nodes"], theirs["nodes"], strict=True):
        before = settings(their)
        assert settings(our) == before | ({"prompt": ""} if "prompt" in before else {})
        left_out = {"widgets_values": None}
        assert our | left_out == their | left_out
