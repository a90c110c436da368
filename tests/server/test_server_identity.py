"""EasyRef Identity in a running ComfyUI, beside EasyRef Apply."""

from __future__ import annotations

import time
from contextlib import closing

import websocket
from server_graphs import STEPS, node, pixels, small

from workshop.comfyui.comfy_server import ComfyServer
from workshop.demo.workflow import Graph, only_node, set_inputs

IDENTITY = "identity"
_TEXT = (3).to_bytes(4, "big")  # ComfyUI's binary event of a text at a node


def with_identity(graph: Graph, **settings: float) -> Graph:
    """The graph with EasyRef Identity before its sampler."""
    sampler = graph[only_node(graph, "KSampler")]["inputs"]
    decoder = graph[only_node(graph, "VAEDecode")]["inputs"]
    given = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "reuse_steps": 1} | settings
    links = {
        "model": sampler["model"],
        "vae": decoder["vae"],
        "references": [only_node(graph, "EasyRefReferences"), 0],
    }
    result = {**graph, IDENTITY: node("EasyRefIdentity", **links, **given)}
    return set_inputs(result, "KSampler", model=[IDENTITY, 0])


def test_references_act_and_weight_zero_changes_nothing(server: ComfyServer) -> None:
    graph = small(seed=22)
    plain = pixels(server, graph)
    assert (pixels(server, with_identity(graph)) != plain).any()
    assert (pixels(server, with_identity(graph, weight=0.0)) == plain).all()


def test_the_error_of_reused_features_is_shown_at_the_node(server: ComfyServer) -> None:
    graph = with_identity(small(seed=23), reuse_steps=2)
    address = f"{server.url.replace('http', 'ws', 1)}/ws?clientId={server._client_id}"
    shown = []
    with closing(websocket.create_connection(address, 30, http_no_proxy=["*"])) as socket:
        queued = server.queue(graph)
        end = time.monotonic() + 60
        while not shown and time.monotonic() < end:
            message = socket.recv()
            if isinstance(message, bytes) and message.startswith(_TEXT):
                length = int.from_bytes(message[4:8], "big")
                name, text = message[8 : 8 + length].decode(), message[8 + length :].decode()
                shown += [text] * (name == IDENTITY)
    server.wait(queued)
    (text,) = shown
    assert text.startswith(f"2 reference passes for {STEPS} calls of the model; relative error")
    assert f"EasyRef Identity: {text}" in server.log
