"""Autogrow inputs: connected, disconnected, saved, loaded and put into subgraphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_page import MODES, ComfyPage

pytestmark = pytest.mark.parametrize("mode", MODES)

# The first EasyRef References node is the target; pictures come from Load Image nodes.
CONNECT = """count => {
    const target = app.graph.nodes.find((node) => node.type === "EasyRefReferences");
    for (let place = 1; place <= count; place++) {
        const source = LiteGraph.createNode("LoadImage");
        source.title = `picture ${place}`;
        app.graph.add(source);
        source.pos = [-400, 60 * place];
        source.connect(0, target, target.findInputSlot(`images.image_${place}`));
    }
}"""
DISCONNECT = """place => {
    const target = app.graph.nodes.find((node) => node.type === "EasyRefReferences");
    target.disconnectInput(target.findInputSlot(`images.image_${place}`));
}"""
SOCKETS = """() => app.graph.nodes.find((node) => node.type === "EasyRefReferences").inputs
    .filter((slot) => slot.type === "IMAGE")
    .map((slot) => slot.label ?? slot.localized_name ?? slot.name)"""
GROUP = "Comfy.GroupNode.ConvertSelectedNodesToGroupNode"
HAS_GROUP_NODES = f"() => app.extensionManager.command.commands.some((c) => c.id === '{GROUP}')"
TITLES = """() => Object.fromEntries(app.graph.nodes.filter((n) => n.type === "LoadImage")
    .map((node) => [String(node.id), node.title]))"""


@pytest.fixture
def grown(page: ComfyPage) -> ComfyPage:
    """EasyRef References with three pictures connected."""
    page.add_node()
    page.evaluate(CONNECT, 3)
    page.wait_for(lambda: len(sockets(page)) == 4, lambda: sockets(page))
    return page


def sockets(page: ComfyPage) -> list[str]:
    return page.evaluate(SOCKETS)


def connected(page: ComfyPage) -> dict[str, str]:
    """Input in API form -> title of the picture's node."""
    titles = page.evaluate(TITLES)
    (inputs,) = (
        node["inputs"]
        for node in page.prompt().values()
        if node["class_type"] == "EasyRefReferences"
    )
    return {
        name: titles[value[0].rpartition(":")[2]]
        for name, value in inputs.items()
        if isinstance(value, list)
    }


THREE = {f"images.image_{n}": f"picture {n}" for n in (1, 2, 3)}


def test_a_new_node_has_a_free_input(page: ComfyPage) -> None:
    page.add_node()
    page.wait_for(lambda: sockets(page)[:1] == ["image_1"], lambda: sockets(page))
    assert len(sockets(page)) <= 2


def test_there_is_always_one_free_input(grown: ComfyPage) -> None:
    assert sockets(grown) == [f"image_{n}" for n in range(1, 5)]
    assert connected(grown) == THREE


def test_ten_pictures_can_be_connected(page: ComfyPage, screenshots: Path) -> None:
    page.add_node()
    page.evaluate(CONNECT, 10)
    page.wait_for(lambda: len(sockets(page)) == 11, lambda: sockets(page))
    assert connected(page) == {f"images.image_{n}": f"picture {n}" for n in range(1, 11)}
    page.next_frames()
    page.screenshot(screenshots, "ten")


def test_later_pictures_move_up_when_one_is_disconnected(grown: ComfyPage) -> None:
    grown.evaluate(DISCONNECT, 2)
    wanted = {"images.image_1": "picture 1", "images.image_2": "picture 3"}
    grown.wait_for(lambda: connected(grown) == wanted, lambda: connected(grown))
    assert sockets(grown) == ["image_1", "image_2", "image_3"]


def test_a_saved_graph_loads_as_it_was(grown: ComfyPage) -> None:
    saved = grown.workflow()
    grown.open()
    grown.load(saved)
    grown.wait_for(lambda: len(sockets(grown)) == 4, lambda: sockets(grown))
    assert sockets(grown) == [f"image_{n}" for n in range(1, 5)]
    assert connected(grown) == THREE


def test_a_chained_group_stays_connected_while_the_inputs_grow(grown: ComfyPage) -> None:
    chain = """() => {
        const target = app.graph.nodes.find((node) => node.type === "EasyRefReferences");
        const before = LiteGraph.createNode("EasyRefReferences");
        app.graph.add(before);
        before.connect(0, target, target.findInputSlot("previous"));
        return [String(target.id), String(before.id)];
    }"""
    target, before = grown.evaluate(chain)
    grown.load(grown.workflow())
    grown.wait_for(lambda: grown.prompt()[target]["inputs"].get("previous") == [before, 0])
    inputs = grown.prompt()[target]["inputs"]
    linked = [name for name, value in inputs.items() if isinstance(value, list)]
    assert sorted(linked) == [*THREE, "previous"]


def test_inputs_keep_their_names_in_a_subgraph(grown: ComfyPage) -> None:
    convert = """() => {
        const node = app.graph.nodes.find((n) => n.type === "EasyRefReferences");
        const {node: outer} = app.graph.convertToSubgraph(new Set([node]));
        return outer.inputs.filter((slot) => slot.link != null).length;
    }"""
    assert grown.evaluate(convert) == 3
    assert connected(grown) == THREE
    grown.load(grown.workflow())
    assert connected(grown) == THREE
    grown.evaluate("""() => {
        const outer = app.graph.nodes.find((node) => node.isSubgraphNode?.());
        app.graph.unpackSubgraph(outer);
    }""")
    grown.wait_for(lambda: connected(grown) == THREE, lambda: connected(grown))


def test_nodes_copied_with_their_pictures_keep_their_links(grown: ComfyPage) -> None:
    grown.evaluate("""() => {
        app.canvas.selectItems([...app.graph.nodes]);
        app.canvas.copyToClipboard();
        app.canvas.pasteFromClipboard();
    }""")
    grown.wait_for(lambda: len(grown.workflow()["nodes"]) == 8)
    titles = grown.evaluate(TITLES)
    copies = [
        {name: titles[link[0]] for name, link in node["inputs"].items() if isinstance(link, list)}
        for node in grown.prompt().values()
        if node["class_type"] == "EasyRefReferences"
    ]
    assert copies == [THREE, THREE]


# Titles of the nodes in the group node. The page fails with two Load Image nodes in one.
GROUPS = {
    "pictures outside": ["first", "second"],
    "a picture inside": ["picture 2", "first", "second"],
    "token sets outside": ["combined", "saved"],
    "token sets inside": ["tokens 1", "tokens 2", "tokens 3", "combined"],
    "everything": [
        *("picture 3", "first", "second"),
        *("tokens 1", "tokens 2", "tokens 3", "combined", "saved"),
    ],
}
BUILD = """() => {
    const add = (type, title, x, y) => {
        const node = LiteGraph.createNode(type);
        Object.assign(node, {title, pos: [x, y]});
        app.graph.add(node);
        return node;
    };
    const link = (from, to, name) => from.connect(0, to, to.findInputSlot(name));
    const first = add("EasyRefReferences", "first", 0, 0);
    const second = add("EasyRefReferences", "second", 400, 0);
    const combined = add("EasyRefCombineTokens", "combined", 1200, 0);
    const saved = add("EasyRefSaveTokens", "saved", 1600, 0);
    for (const number of [1, 2, 3, 4]) {
        const picture = add("LoadImage", `picture ${number}`, -400, 400 * number);
        if (number < 4) link(picture, first, `images.image_${number}`);
        else link(picture, second, "images.image_1");
    }
    link(first, second, "previous");
    first.widgets.find((w) => w.name === "weight").value = 0.5;
    const loader = add("EasyRefLoader", "loader", 400, 800);
    for (const number of [1, 2, 3]) {
        const tokens = add("EasyRefEncode", `tokens ${number}`, 800, 400 * number);
        link(loader, tokens, "easyref");
        link(number > 1 ? second : first, tokens, "references");
        link(tokens, combined, `tokens.tokens_${number}`);
    }
    combined.widgets.find((w) => w.name === "weights").value = "1, 2, 3";
    link(combined, saved, "tokens");
}"""
SELECT = """titles => app.canvas.selectItems(
    app.graph.nodes.filter((node) => titles.includes(node.title)))"""
UNGROUP = """() => app.graph.nodes.find((node) => node.convertToNodes).convertToNodes()"""
OPEN_GROUPS = "() => app.graph.nodes.filter((node) => node.convertToNodes).length"


def unnamed(prompt: dict[str, Any]) -> list[str]:
    """The nodes of a graph in API form, with each link replaced by its source node."""

    def expanded(node_id: str) -> dict[str, Any]:
        node = prompt[node_id]
        inputs = {
            name: [expanded(value[0]), value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        return {"class_type": node["class_type"], "inputs": inputs}

    return sorted(json.dumps(expanded(node_id), sort_keys=True) for node_id in prompt)


@pytest.mark.parametrize("case", GROUPS)
def test_inputs_keep_their_links_in_a_group_node(page: ComfyPage, case: str) -> None:
    """Newer pages have no group nodes."""
    if not page.evaluate(HAS_GROUP_NODES):
        pytest.skip("this page of ComfyUI makes no group nodes")
    page.evaluate(BUILD)
    wanted = unnamed(page.prompt())
    page.evaluate(SELECT, GROUPS[case])
    page.evaluate(f"() => {{ app.extensionManager.command.execute('{GROUP}'); }}")
    page.tab.locator("[role=dialog] input").fill("together")
    page.tab.keyboard.press("Enter")
    page.wait_for(lambda: page.evaluate(OPEN_GROUPS) == 1)
    assert unnamed(page.prompt()) == wanted, "at once"
    page.next_frames()
    assert unnamed(page.prompt()) == wanted

    saved = page.workflow()
    page.open()
    page.load(saved)
    assert unnamed(page.prompt()) == wanted, "loaded"

    page.evaluate(UNGROUP)
    page.wait_for(lambda: not page.evaluate(OPEN_GROUPS))
    page.next_frames()
    assert unnamed(page.prompt()) == wanted, "as single nodes again"
