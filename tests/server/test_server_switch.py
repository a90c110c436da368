"""The templates on the demo models, and EasyRef Demo Models as the switch to them."""

from __future__ import annotations

import copy

import pytest
from server_graphs import SIDE, STEPS, pixels, small, with_test_pictures

from workshop.comfyui.comfy_client import ComfyUIError
from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import (
    WORKFLOWS,
    Graph,
    load_workflow,
    only_node,
    set_inputs,
    use_demo_models,
    without_easyref,
)

SWITCH = "EasyRefDemoModels"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
TOKENS = "easyref_tokens"
PREFIX = "switch"


def test_muting_the_loaders_is_all_that_the_demo_models_need(server: ComfyServer) -> None:
    graph = with_test_pictures(use_demo_models(load_workflow("easyref_quick")))
    size = graph[only_node(graph, "EmptyLatentImage")]["inputs"]
    assert (size["width"], size["height"]) == (1024, 1024)
    graph = set_inputs(graph, "KSampler", steps=STEPS)
    assert pixels(server, graph).shape == (SIDE, SIDE, 3)


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


def twice(graph: Graph, *left_out: str) -> Graph:
    """A second switch behind the first: to it, the demo models are connected ones."""
    first = only_node(graph, SWITCH)
    changed = copy.deepcopy(graph)
    for node in changed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == first:
                node["inputs"][name] = ["second", value[1]]
    names = ("model", "clip", "vae", "easyref", "control_net", "latent")
    inputs = {name: [first, slot] for slot, name in enumerate(names) if name not in left_out}
    changed["second"] = {"class_type": SWITCH, "inputs": inputs}
    return changed


def test_connected_models_pass_through(server: ComfyServer) -> None:
    graph = small("easyref_controlnet", seed=22)
    assert (pixels(server, twice(graph)) == pixels(server, graph)).all()


def test_a_set_with_gaps_is_refused(server: ComfyServer) -> None:
    with pytest.raises(ComfyUIError) as caught:
        server.run(twice(small(seed=22), "clip", "easyref"))
    assert "has model, vae, control_net connected, but not clip, easyref" in str(caught.value)


def test_without_a_controlnet_only_what_needs_one_stops(server: ComfyServer) -> None:
    graph = small(seed=23)
    assert (pixels(server, twice(graph, "control_net")) == pixels(server, graph)).all()
    graph = twice(small("easyref_controlnet", seed=23), "control_net")
    run = server.run(graph)
    assert only_node(graph, "SaveImage") not in run.outputs


def test_the_loaders_are_asked_for_while_they_are_not_muted(server: ComfyServer) -> None:
    with pytest.raises(ComfyUIError) as caught:
        server.queue(load_workflow("easyref_controlnet"))
    for loader in ("CheckpointLoaderSimple", "EasyRefLoader", "ControlNetLoader"):
        assert loader in str(caught.value)
