"""Autogrow inputs, by the names they have in a graph in API form."""

from __future__ import annotations

from typing import Any

import pytest
from server_graphs import FOURTH, OTHERS, REFERENCES, node, small

from workshop.comfyui.comfy_client import ComfyUIError
from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import Graph, only_node


def inspected(pictures: dict[str, str], **inputs: Any) -> Graph:
    """EasyRef Inspect on an EasyRef References node with these files on its inputs."""
    graph = {"demo": node("EasyRefDemoModels"), "group": node("EasyRefReferences", weight=1.0)}
    graph["group"]["inputs"] |= inputs
    for name, file in pictures.items():
        graph[name] = node("LoadImage", image=file)
        graph["group"]["inputs"][name] = [name, 0]
    graph["inspect"] = node(
        "EasyRefInspect", easyref=["demo", 3], references=["group", 0], prompt="", image_size=0
    )
    return graph


def report(server: ComfyServer, graph: Graph) -> list[str]:
    """The names of the references, in order."""
    lines = "".join(server.run(graph).outputs["inspect"]["text"]).splitlines()
    end = next(n for n, line in enumerate(lines) if line.startswith("all references: "))
    return [line.partition(". ")[2].partition(":")[0] for line in lines[:end]]


def test_references_follow_the_input_numbers_with_gaps_and_above_ten(server: ComfyServer) -> None:
    pictures = {f"images.image_{n}": REFERENCES[n % 3] for n in (12, 100, 2, 9, 10)}
    assert report(server, inspected(pictures)) == [f"image_{n}" for n in (2, 9, 10, 12, 100)]


def test_another_input_or_one_more_picture_runs_the_node_again(
    server: ComfyServer,
) -> None:
    assert report(server, inspected({"images.image_1": FOURTH})) == ["image_1"]
    assert report(server, inspected({"images.image_5": FOURTH})) == ["image_5"]
    two = {"images.image_1": FOURTH, "images.image_2": OTHERS[0]}
    assert report(server, inspected(two)) == ["image_1", "image_2"]


def test_no_picture_is_needed_with_a_previous_group(server: ComfyServer) -> None:
    graph = inspected({})
    graph["before"] = node("EasyRefReferences", weight=1.0, **{"images.image_1": ["first", 0]})
    graph["first"] = node("LoadImage", image=FOURTH)
    graph["group"]["inputs"]["previous"] = ["before", 0]
    assert report(server, graph) == ["image_1"]
    with pytest.raises(ComfyUIError, match="has no picture"):
        server.run(inspected({}))


@pytest.mark.parametrize("given", [(), ("tokens_1",), ("tokens_2",)])
def test_fewer_than_two_token_sets_are_refused_with_a_clear_message(
    server: ComfyServer, given: tuple[str, ...]
) -> None:
    graph = small()
    encode, apply = (only_node(graph, f"EasyRef{n}") for n in ("Encode", "Apply"))
    graph["combined"] = node(
        "EasyRefCombineTokens",
        method="add",
        weights="1, 1",
        **{f"tokens.{name}": [encode, 0] for name in given},
    )
    graph[apply]["inputs"]["tokens"] = ["combined", 0]
    with pytest.raises(ComfyUIError) as caught:
        server.run(graph)
    # Newer ComfyUIs refuse it before the run.
    text = str(caught.value)
    assert "Required input is missing" in text or "Connect tokens_1 and tokens_2" in text


def test_weights_that_are_no_numbers_are_refused_before_the_run(server: ComfyServer) -> None:
    graph = small()
    encode, apply = (only_node(graph, f"EasyRef{n}") for n in ("Encode", "Apply"))
    links = {f"tokens.tokens_{n}": [encode, 0] for n in (1, 2, 3)}
    graph["combined"] = node("EasyRefCombineTokens", method="add", weights="1, much", **links)
    graph[apply]["inputs"]["tokens"] = ["combined", 0]
    with pytest.raises(ComfyUIError, match="weights holds 'much', which is no number"):
        server.run(graph)
