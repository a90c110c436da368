"""The graphs photographed for the help pages fit the nodes as they are now."""

from __future__ import annotations

import re

import pytest
from documents import PAGES
from node_texts import node_texts

from workshop.pages.graphs import GRAPHS, WIDE
from workshop.pages.plot_weight_curves import PICTURE

INPUTS = {node.node_id: set(node.inputs) for node in node_texts()}
OUTPUTS = {node.node_id: {name for name, _ in node.outputs} for node in node_texts()}


@pytest.mark.parametrize("name", GRAPHS)
def test_nodes_have_the_inputs_and_outputs_that_a_graph_uses(name: str) -> None:
    graph = GRAPHS[name]()
    for node in graph.nodes:
        if node.kind in INPUTS:
            used = {re.sub(r"^tokens_\d+$", "tokens", key) for key in (*node.inputs, *node.values)}
            assert used <= INPUTS[node.kind], node.kind
        for link in node.inputs.values():
            source = graph.nodes[link.node].kind
            assert source not in OUTPUTS or link.name in OUTPUTS[source], source


@pytest.mark.parametrize("name", GRAPHS)
def test_pictures_are_narrow_enough_for_the_help_panel(name: str) -> None:
    for row in GRAPHS[name]().rows:
        assert sum(node.size[0] for node in row if node.size) <= WIDE


def test_every_picture_of_the_help_pages_can_be_made_again() -> None:
    made = {f"{name}.webp" for name in GRAPHS} | {PICTURE.name}
    assert {path.name for path in (PAGES / "images").iterdir()} == made
