"""The template files: known nodes, typed links, models with URLs, groups and notes."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import EXAMPLE, WORKFLOWS

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
EXPECTED = {"character", "style", "controlnet", "two_people", "curves_and_layers", "tokens"}
EXPECTED |= {"with_lora", "quick", "score", "stages", "subgraph", "try"}
WITHOUT_MODELS = "easyref_try"
LOADERS = {"CheckpointLoaderSimple", "EasyRefLoader", "ControlNetLoader", "LoraLoader"}
TITLE_HEIGHT = 30

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


def test_all_expected_templates_are_there() -> None:
    assert {name.removeprefix("easyref_") for name in NAMES} == EXPECTED


def graphs(template: dict[str, Any]) -> list[dict[str, Any]]:
    """The template and its subgraphs."""
    return [template, *template.get("definitions", {}).get("subgraphs", [])]


def test_every_node_and_slot_is_registered(server: ComfyServer, template: dict[str, Any]) -> None:
    """Classes, names and types; links refer to a slot by its index."""
    object_info = server.get_json("/object_info")
    known = {*object_info, "MarkdownNote", *(graph.get("id") for graph in graphs(template))}
    for node in (node for graph in graphs(template) for node in graph["nodes"]):
        assert node["type"] in known
        info = object_info.get(node["type"])
        if info is None:
            continue
        current = list(zip(info["output_name"], map(type_name, info["output"]), strict=True))
        outputs = [(slot["name"], slot["type"]) for slot in node["outputs"]]
        assert outputs[: len(current)] == current
        # Newer ComfyUIs add outputs to nodes such as Save Image; those must have no links.
        assert not any(slot.get("links") for slot in node["outputs"][len(current) :])
        # Without the hidden ones, such as ComfyUI's own "prompt" of nodes that show results.
        shown = [info["input"].get(part, {}) for part in ("required", "optional")]
        given = {n: kind[0] for inputs in shown for n, kind in inputs.items()}
        for slot in node["inputs"]:
            if slot["type"] == "IMAGEUPLOAD":  # the page's upload button
                continue
            name = slot["name"].partition(".")[0]  # of autogrow inputs: images.image_1
            assert name in given
            if "." not in slot["name"]:
                assert slot["type"] == type_name(given[name])


def type_name(given: Any) -> str:
    """A slot's type; COMBO for a list of choices."""
    return "COMBO" if isinstance(given, list) else given


def test_links_match_the_slots_at_both_ends(
    template: dict[str, Any], nodes: dict[int, dict[str, Any]]
) -> None:
    for link_id, source, out_slot, target, in_slot, kind in template["links"]:
        output, entry = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert link_id in output["links"]
        assert link_id == entry["link"]
        assert output["type"] == kind
        assert entry["type"] in (kind, "*")


def test_node_and_link_ids_are_unique(template: dict[str, Any]) -> None:
    nodes = [node["id"] for graph in graphs(template) for node in graph["nodes"]]
    links = [link[0] for link in template["links"]]
    links += [link["id"] for graph in graphs(template)[1:] for link in graph["links"]]
    for ids, last in ((nodes, "last_node_id"), (links, "last_link_id")):
        assert len(set(ids)) == len(ids)
        assert template[last] == max(ids)


def test_every_loader_and_the_note_name_the_file_and_its_url(
    server: ComfyServer, name: str, nodes: dict[int, dict[str, Any]]
) -> None:
    loaders = [n for n in nodes.values() if n["type"] in LOADERS]
    assert bool(loaders) == (name != WITHOUT_MODELS)
    folders = server.get_json("/models")
    (note,) = (n["widgets_values"][0] for n in nodes.values() if n["type"] == "MarkdownNote")
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] in node["widgets_values"]
        assert model["directory"] in folders
        assert model["url"].startswith("https://")
        assert model["url"].endswith(f"/{model['name']}")
        page = model["url"].removesuffix(f"/resolve/main/{model['name']}")
        for link in (f"[{model['name']}]({model['url']})", f"]({page})"):
            assert link in note
        assert f"`models/{model['directory']}`" in note


def test_the_note_lists_steps_fixes_and_models(name: str, nodes: dict[int, dict[str, Any]]) -> None:
    (note,) = (n for n in nodes.values() if n["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert note["title"] == "How to use"
    wanted = ["**Steps**\n1. ", "**If the result is off**\n- "]
    if name != WITHOUT_MODELS:
        wanted += ["**Models**", f"**{WITHOUT_MODELS}**"]
    for part in wanted:
        assert part in text


def test_references_start_as_an_empty_gallery(nodes: dict[int, dict[str, Any]]) -> None:
    """Load Image nodes use the example picture that comes with ComfyUI."""
    for node in nodes.values():
        if node["type"] == "EasyRefReferences":
            assert all(slot["link"] is None for slot in node["inputs"])
            assert "" in node["widgets_values"]
        if node["type"] == "LoadImage":
            assert EXAMPLE in node["widgets_values"]


def box(node: dict[str, Any]) -> Box:
    x, y = node["pos"]
    width, height = node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def groups_of(template: dict[str, Any], node: dict[str, Any]) -> list[str]:
    """The titles of the groups that contain a node entirely."""
    left, top, right, bottom = box(node)
    return [
        group["title"]
        for group in template["groups"]
        for x, y, width, height in [group["bounding"]]
        if x <= left and y <= top and right <= x + width and bottom <= y + height
    ]


def test_every_node_except_the_note_is_in_one_group(
    template: dict[str, Any], nodes: dict[int, dict[str, Any]]
) -> None:
    for node in nodes.values():
        assert len(groups_of(template, node)) == (0 if node["type"] == "MarkdownNote" else 1)


def test_groups_do_not_overlap(template: dict[str, Any]) -> None:
    boxes = [(x, y, x + w, y + h) for g in template["groups"] for x, y, w, h in [g["bounding"]]]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
