"""End to end: the shipped workflows, queued on a real server, and the pictures they give."""

from __future__ import annotations

import numpy as np
from server_graphs import SIDE, other_references, pixels, small

from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import (
    load_workflow,
    only_node,
    set_inputs,
    use_demo_models,
    without_easyref,
)


def test_the_shipped_workflow_gives_a_picture_from_references_of_three_sizes(
    server: ComfyServer,
) -> None:
    picture = pixels(server, small())
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture.std() > 1


def test_only_another_seed_gives_another_picture(server: ComfyServer) -> None:
    first = pixels(server, small(seed=1))
    other = pixels(server, small(seed=2))
    # Seed 2 has replaced the results of seed 1 in ComfyUI's cache.
    run = server.run(small(seed=1))
    sampler, save = only_node(small(), "KSampler"), only_node(small(), "SaveImage")
    assert sampler not in run.cached
    again = np.asarray(server.pictures(run, save)[0])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_cached_graph_still_returns_its_picture(server: ComfyServer) -> None:
    first = pixels(server, small(seed=4))
    run = server.run(small(seed=4))
    save = only_node(small(), "SaveImage")
    assert save in run.cached
    assert np.array_equal(np.asarray(server.pictures(run, save)[0]), first)


def test_weight_and_lora_at_zero_give_the_plain_model(server: ComfyServer) -> None:
    plain = pixels(server, without_easyref(small(seed=3)))
    at_zero = set_inputs(small(seed=3), "EasyRefApply", weight=0.0, lora_strength=0.0)
    assert np.array_equal(pixels(server, at_zero), plain)
    assert not np.array_equal(pixels(server, small(seed=3)), plain)


def test_the_lora_still_applies_at_weight_0(server: ComfyServer) -> None:
    plain = pixels(server, without_easyref(small(seed=3)))
    assert not np.array_equal(
        pixels(server, set_inputs(small(seed=3), "EasyRefApply", weight=0.0)), plain
    )


def test_other_references_give_another_picture(server: ComfyServer) -> None:
    graph = small(seed=4)
    assert not np.array_equal(pixels(server, graph), pixels(server, other_references(graph)))


def test_the_prompt_of_encode_changes_the_picture(server: ComfyServer) -> None:
    graph = small(seed=4)
    changed = set_inputs(graph, "EasyRefEncode", prompt="a character asleep under the moon")
    assert not np.array_equal(pixels(server, graph), pixels(server, changed))


def test_a_controlnet_and_the_references_both_change_the_picture(server: ComfyServer) -> None:
    alone = pixels(server, small(seed=5))
    controlled = small("easyref_controlnet", seed=5)
    steered = pixels(server, controlled)
    assert steered.shape == alone.shape
    assert not np.array_equal(steered, alone)
    without_references = pixels(server, without_easyref(controlled))
    assert not np.array_equal(steered, without_references)


def test_saved_tokens_give_the_picture_of_fresh_ones(server: ComfyServer) -> None:
    fresh = pixels(server, small(seed=6))
    saving = use_demo_models(load_workflow("easyref_save_tokens"))
    shown = server.run(saving).outputs[only_node(saving, "EasyRefSaveTokens")]["tokens"][0]
    reusing = small("easyref_load_tokens", seed=6)
    chosen = reusing[only_node(reusing, "EasyRefLoadTokens")]["inputs"]["file"]
    assert chosen == f"{shown['filename']} [{shown['type']}]"
    offered = server.get_json("/object_info/EasyRefLoadTokens")["EasyRefLoadTokens"]
    assert chosen in offered["input"]["required"]["file"][1]["options"]
    assert "EasyRefEncode" not in {node["class_type"] for node in reusing.values()}
    assert np.array_equal(pixels(server, reusing), fresh)
