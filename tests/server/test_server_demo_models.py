"""The templates, run on the demo models."""

from __future__ import annotations

import pytest
from server_graphs import SIDE, pixels, small

from workshop.comfyui.comfy_client import ComfyUIError
from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import (
    WORKFLOWS,
    Graph,
    load_workflow,
    only_node,
    set_inputs,
    without_easyref,
)

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
TOKENS = "easyref_tokens"
PREFIX = "prepared"


def test_easyref_try_runs_unchanged(server: ComfyServer) -> None:
    """It needs no model file and no upload, and shows its references and its result."""
    graph = load_workflow("easyref_try")
    run = server.run(graph)
    (result,) = server.pictures(run, only_node(graph, "SaveImage"))
    assert result.size == (SIDE, SIDE)
    assert len(server.pictures(run, only_node(graph, "PreviewImage"))) == 4


def test_easyref_try_gives_another_picture_at_weight_0(server: ComfyServer) -> None:
    graph = load_workflow("easyref_try")
    plain = set_inputs(graph, "EasyRefQuick", weight=0.0)
    assert (pixels(server, graph) != pixels(server, plain)).any()


def prepared(server: ComfyServer, name: str) -> Graph:
    """A template on the demo models; tokens that it loads are saved first."""
    graph = small(name, seed=21)
    if name != TOKENS:
        return graph
    graph = set_inputs(graph, "EasyRefSaveTokens", filename_prefix=PREFIX)
    graph = set_inputs(graph, "EasyRefLoadTokens", file="absent.safetensors [output]")
    # Loading fails validation until the tokens are saved; ComfyUI still runs the saving part.
    outputs = server.run(graph).outputs
    assert only_node(graph, "SaveImage") not in outputs
    (saved,) = outputs[only_node(graph, "EasyRefSaveTokens")]["tokens"]
    return set_inputs(graph, "EasyRefLoadTokens", file=f"{saved['filename']} [{saved['type']}]")


@pytest.mark.parametrize("name", NAMES)
def test_every_template_gives_a_picture_on_the_demo_models(server: ComfyServer, name: str) -> None:
    picture = pixels(server, prepared(server, name))
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.std() > 1


def test_regions_curves_and_saved_tokens_change_the_picture(server: ComfyServer) -> None:
    """With one prompt and no EasyRef Apply they all give the picture of the plain model."""
    plain = pixels(server, without_easyref(small(seed=21)))
    for name in ("easyref_two_people", "easyref_curves_and_layers", TOKENS):
        graph = prepared(server, name)
        graph = set_inputs(graph, "PrimitiveStringMultiline", value=prompt_of(small()))
        assert (pixels(server, without_easyref(graph)) == plain).all(), name
        assert (pixels(server, graph) != plain).any(), name


def prompt_of(graph: Graph) -> str:
    return graph[only_node(graph, "PrimitiveStringMultiline")]["inputs"]["value"]


def test_missing_models_are_named_before_the_run(server: ComfyServer) -> None:
    with pytest.raises(ComfyUIError) as caught:
        server.queue(load_workflow("easyref_controlnet"))
    for loader in ("CheckpointLoaderSimple", "EasyRefLoader", "ControlNetLoader"):
        assert loader in str(caught.value)
