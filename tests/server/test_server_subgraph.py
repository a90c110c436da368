"""The template with EasyRef as a subgraph, and the blueprint, which also holds the loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import load_workflow

INPUT, OUTPUT = -10, -20  # the node ids of a subgraph's own inputs and outputs


def parts(graph: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only subgraph definition of a graph, and its subgraph node."""
    (definition,) = graph["definitions"]["subgraphs"]
    (outer,) = (node for node in graph["nodes"] if node["type"] == definition["id"])
    return definition, outer


def settings(node: dict[str, Any]) -> dict[str, Any]:
    """A node's widget values by name."""
    names = [slot["name"] for slot in node["inputs"] if slot.get("widget")]
    return dict(zip(names, node["widgets_values"], strict=True))


@pytest.fixture(scope="module")
def template(pack: Path) -> dict[str, Any]:
    path = pack / "workflows" / "easyref_subgraph.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def blueprint(pack: Path) -> dict[str, Any]:
    (path,) = (pack / "subgraphs").glob("*.json")  # where ComfyUI looks for them
    assert path.stem == "EasyRef"  # the name it shows
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=["template", "blueprint"])
def either(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


def named_links(graph: dict[str, Any]) -> set[tuple[str, str, str, str]]:
    """Each link of a graph without subgraphs: source class, output, target class, input."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    return {
        (
            nodes[source]["type"],
            nodes[source]["outputs"][out_slot]["name"],
            nodes[target]["type"],
            nodes[target]["inputs"][in_slot]["name"],
        )
        for _, source, out_slot, target, in_slot, _ in graph["links"]
    }


def links_inside(graph: dict[str, Any]) -> set[tuple[str, str, str, str]]:
    """The same inside the subgraph, whose own inputs and outputs have the class ""."""
    definition, _ = parts(graph)
    ends = [
        {"id": INPUT, "type": "", "outputs": definition["inputs"]},
        {"id": OUTPUT, "type": "", "inputs": definition["outputs"]},
    ]
    links = [[*link.values()] for link in definition["links"]]
    return named_links({"nodes": [*definition["nodes"], *ends], "links": links})


def test_the_templates_api_form_links_the_whole_chain() -> None:
    graph = load_workflow("easyref_subgraph")
    links = {
        (graph[value[0]]["class_type"], value[1], node["class_type"], name)
        for node in graph.values()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    assert links >= {
        ("CheckpointLoaderSimple", 0, "EasyRefApply", "model"),
        ("EasyRefLoader", 0, "EasyRefEncode", "easyref"),
        ("EasyRefLoader", 0, "EasyRefApply", "easyref"),
        ("EasyRefReferences", 0, "EasyRefEncode", "references"),
        ("PrimitiveStringMultiline", 0, "EasyRefEncode", "prompt"),
        ("PrimitiveStringMultiline", 0, "CLIPTextEncode", "text"),
        ("EasyRefEncode", 0, "EasyRefApply", "tokens"),
        ("EasyRefApply", 0, "KSampler", "model"),
    }
    assert ("CheckpointLoaderSimple", 0, "KSampler", "model") not in links


def test_the_template_exposes_the_inputs_of_encode_and_apply(template: dict[str, Any]) -> None:
    definition, outer = parts(template)
    assert [node["type"] for node in definition["nodes"]] == ["EasyRefEncode", "EasyRefApply"]
    linked = [slot["name"] for slot in outer["inputs"] if slot["link"] is not None]
    unlinked = [slot["name"] for slot in outer["inputs"] if slot["link"] is None]
    assert linked == ["model", "easyref", "references", "prompt"]
    assert unlinked == ["images", "weight", "start_percent"]
    assert settings(outer).items() >= {"weight": 1, "start_percent": 0}.items()


def test_the_blueprint_links_loader_encode_and_apply(blueprint: dict[str, Any]) -> None:
    definition, outer = parts(blueprint)
    kinds = [node["type"] for node in definition["nodes"]]
    assert kinds == ["EasyRefLoader", "EasyRefEncode", "EasyRefApply"]
    assert links_inside(blueprint) == {
        ("", "references", "EasyRefEncode", "references"),
        ("", "prompt", "EasyRefEncode", "prompt"),
        ("", "images", "EasyRefEncode", "images"),
        ("", "model", "EasyRefApply", "model"),
        ("", "weight", "EasyRefApply", "weight"),
        ("", "start_percent", "EasyRefApply", "start_percent"),
        ("", "adapter", "EasyRefLoader", "adapter"),
        ("", "mllm", "EasyRefLoader", "mllm"),
        ("EasyRefLoader", "easyref", "EasyRefEncode", "easyref"),
        ("EasyRefLoader", "easyref", "EasyRefApply", "easyref"),
        ("EasyRefEncode", "tokens", "EasyRefApply", "tokens"),
        ("EasyRefApply", "model", "", "model"),
    }
    assert settings(outer) == {
        "prompt": "",
        "adapter": "model.safetensors",
        "mllm": "from adapter",
        "weight": 1,
        "start_percent": 0,
    }


def test_the_blueprint_is_one_unlinked_subgraph_node(blueprint: dict[str, Any]) -> None:
    _, outer = parts(blueprint)
    assert blueprint["nodes"] == [outer]
    assert blueprint["links"] == []
    assert {slot["link"] for slot in outer["inputs"]} == {None}
    assert {slot["links"] for slot in outer["outputs"]} == {None}


def test_the_blueprints_slots_keep_their_order(blueprint: dict[str, Any]) -> None:
    """Saved graphs refer to a slot by its index."""
    _, outer = parts(blueprint)
    shown = ["references", "prompt", "model", "images", "adapter", "mllm", "weight"]
    assert [slot["name"] for slot in outer["inputs"]] == [*shown, "start_percent"]


def test_template_and_blueprint_can_be_in_one_graph(
    template: dict[str, Any], blueprint: dict[str, Any]
) -> None:
    (first, _), (second, _) = parts(template), parts(blueprint)
    assert first["id"] != second["id"]
    assert (first["name"], second["name"]) == ("EasyRef", "EasyRef")


def test_the_subgraph_node_has_the_slots_of_its_definition(either: dict[str, Any]) -> None:
    definition, outer = parts(either)
    for side in ("inputs", "outputs"):
        shown = [(slot["name"], slot["type"]) for slot in definition[side]]
        assert [(slot["name"], slot["type"]) for slot in outer[side]] == shown
    ids = [slot["id"] for slot in (*definition["inputs"], *definition["outputs"])]
    assert len(set(ids)) == len(ids)


def test_inner_nodes_have_the_current_slots(server: ComfyServer, either: dict[str, Any]) -> None:
    definition, _ = parts(either)
    for node in definition["nodes"]:
        schema = server.get_json(f"/object_info/{node['type']}")[node["type"]]
        current = [name for names in schema["input_order"].values() for name in names]
        # Links refer to a slot by its index; widget inputs come after the other inputs.
        slots = [slot["name"] for slot in node["inputs"]]
        widgets = [slot["name"] for slot in node["inputs"] if slot.get("widget")]
        assert slots == [name for name in current if name not in widgets] + widgets
        assert [slot["name"] for slot in node["outputs"]] == schema["output_name"]


def test_inner_links_match_the_slots_at_both_ends(either: dict[str, Any]) -> None:
    definition, _ = parts(either)
    nodes = {node["id"]: node for node in definition["nodes"]}
    for link in definition["links"]:
        kinds = {link["type"]}
        if link["origin_id"] == INPUT:
            start = definition["inputs"][link["origin_slot"]]
            assert link["id"] in start["linkIds"]
        else:
            start = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert link["id"] in start["links"]
        if link["target_id"] == OUTPUT:
            end = definition["outputs"][link["target_slot"]]
            assert link["id"] in end["linkIds"]
        else:
            end = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert link["id"] == end["link"]
        assert kinds == {start["type"], end["type"]}
    linked = [slot["link"] for node in nodes.values() for slot in node["inputs"]]
    ids = [link["id"] for link in definition["links"] if link["target_id"] != OUTPUT]
    assert sorted(number for number in linked if number is not None) == sorted(ids)


def test_widget_values_of_the_subgraph_node_match_the_inner_nodes(either: dict[str, Any]) -> None:
    definition, outer = parts(either)
    inside = {name: value for node in definition["nodes"] for name, value in settings(node).items()}
    assert settings(outer).items() <= inside.items()
