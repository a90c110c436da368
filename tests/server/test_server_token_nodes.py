"""Quick, Crop, Combine Tokens and Inspect in graphs that a real server runs."""

from __future__ import annotations

import io
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from server_graphs import OTHERS, node, pixels, small

from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import Graph, only_node


def tokens_of_another_character(graph: Graph) -> dict[str, Any]:
    """Nodes that encode one other picture, with the graph's prompt."""
    encode = graph[only_node(graph, "EasyRefEncode")]["inputs"]
    return {
        "other": node("LoadImage", image=OTHERS[0]),
        "other_tokens": node(
            "EasyRefEncode",
            **{n: v for n, v in encode.items() if n != "references"},
            images=["other", 0],
        ),
    }


def test_quick_gives_the_same_picture_as_encode_and_apply(server: ComfyServer) -> None:
    graph = small(seed=21)
    encode, apply = (graph[only_node(graph, f"EasyRef{n}")]["inputs"] for n in ("Encode", "Apply"))
    quick = {n: entry for n, entry in graph.items() if entry["class_type"] != "EasyRefEncode"}
    quick[only_node(graph, "EasyRefApply")] = node(
        "EasyRefQuick",
        model=apply["model"],
        easyref=apply["easyref"],
        references=encode["references"],
        prompt=encode["prompt"],
        weight=1.0,
    )
    assert np.array_equal(pixels(server, quick), pixels(server, graph))


def test_crop_returns_a_list_of_pictures_and_one_group(server: ComfyServer) -> None:
    graph = small(seed=22)
    encode = only_node(graph, "EasyRefEncode")
    whole = pixels(server, graph)
    box = {"x": 0.25, "y": 0.25, "width": 0.4, "height": 0.3}
    graph["picture"] = node("LoadImage", image=OTHERS[0])
    graph["mask"] = node("SolidMask", value=1.0, width=64, height=32)
    graph["batch"] = node("RepeatImageBatch", image=["picture", 0], amount=2)
    graph["crop"] = node("EasyRefCrop", images=["batch", 0], **box, padding=0.25, square=True)
    graph["shown"] = node("PreviewImage", images=["crop", 0])
    graph[encode]["inputs"]["references"] = ["crop", 1]
    run = server.run(graph)
    assert len(server.pictures(run, "shown")) == 2
    (picture,) = server.pictures(run, only_node(graph, "SaveImage"))
    assert not np.array_equal(np.asarray(picture), whole)
    graph["crop"]["inputs"]["mask"] = ["mask", 0]
    shown = server.pictures(server.run(graph), "shown")
    with Image.open(server.base / "input" / OTHERS[0]) as given:
        assert [picture.size for picture in shown] == [given.size] * 2


def test_each_combine_method_gives_another_picture(server: ComfyServer) -> None:
    graph = small(seed=23)
    results = [pixels(server, graph)]
    encode, apply = (only_node(graph, f"EasyRef{n}") for n in ("Encode", "Apply"))
    graph |= tokens_of_another_character(graph)
    graph[apply]["inputs"]["tokens"] = ["combined", 0]
    for method in ("concatenate", "average", "avoid"):
        graph["combined"] = node(
            "EasyRefCombineTokens",
            method=method,
            weights="1, 1",
            **{"tokens.tokens_1": [encode, 0], "tokens.tokens_2": ["other_tokens", 0]},
        )
        results.append(pixels(server, graph))
    different = [not np.array_equal(a, b) for i, a in enumerate(results) for b in results[:i]]
    assert all(different)


def test_inspect_shows_its_pictures_and_its_report(server: ComfyServer) -> None:
    graph = small(seed=24)
    given = graph[only_node(graph, "EasyRefEncode")]["inputs"]
    names = ("easyref", "references", "prompt", "image_size")
    graph["inspect"] = node("EasyRefInspect", **{n: given[n] for n in names})
    run = server.run(graph)
    shown = run.outputs["inspect"]
    assert len(shown["images"]) == 3
    picture = Image.open(io.BytesIO(server.get(f"/view?{urlencode(shown['images'][0])}")))
    assert picture.size == (512, 644)
    lines = "".join(shown["text"]).splitlines()
    assert len(lines) == 3 + 4
    assert lines[3].startswith("all references: ")
