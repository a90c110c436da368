"""The templates on the demo models."""

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


def test_the_template_to_try_runs_as_it_is(server: ComfyServer) -> None:
    """No model, no upload and no change; both the references and the result are shown."""
    graph = load_workflow("easyref_try")
    run = server.run(graph)
    (result,) = server.pictures(run, only_node(graph, "SaveImage"))
    assert result.size == (SIDE, SIDE)
    assert len(server.pictures(run, only_node(graph, "PreviewImage"))) == 4


def test_without_references_the_template_to_try_gives_another_picture(server: ComfyServer) -> None:
    graph = load_workflow("easyref_try")
    plain = set_inputs(graph, "EasyRefQuick", weight=0.0)
    assert (pixels(server, graph) != pixels(server, plain)).any()


def prepared(server: ComfyServer, name: str) -> Graph:
    """A template on the demo models; where it loads saved tokens, they are saved first."""
    graph = small(name, seed=21)
    if name != TOKENS:
        return graph
    graph = set_inputs(graph, "EasyRefSaveTokens", filename_prefix=PREFIX)
    graph = set_inputs(graph, "EasyRefLoadTokens", file="absent.safetensors [output]")
    # The part that cannot run yet does not keep the other one from running.
    outputs = server.run(graph).outputs
    assert only_node(graph, "SaveImage") not in outputs
    (shown,) = outputs[only_node(graph, "EasyRefSaveTokens")]["tokens"]
    return set_inputs(graph, "EasyRefLoadTokens", file=f"{shown['filename']} [{shown['type']}]")


@pytest.mark.parametrize("name", NAMES)
def test_every_template_gives_a_picture_on_the_demo_models(server: ComfyServer, name: str) -> None:
    picture = pixels(server, prepared(server, name))
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.std() > 1


def test_the_references_act_in_every_template(server: ComfyServer) -> None:
    """The regions, curves and saved tokens change the picture; the plain model is the same."""
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
