"""The demo's pictures made by a real ComfyUI server, from the shipped workflows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .comfy_server import ComfyServer
from .find_comfyui import comfyui_version
from .parts import Material, Pictures, Settings
from .workflow import (
    Graph,
    load_workflow,
    only_node,
    set_inputs,
    use_demo_models,
    with_pictures,
    without_easyref,
)

_REFERENCES = ("reference_1.png", "reference_2.png", "reference_3.png")
_CONTROL = "control.png"
_EDGES = "edges"


def make_pictures(comfyui: Path, material: Material) -> Pictures:
    """Start the server, run the workflows on the demo models, and stop it again.

    Raises:
        ComfyUIError: the server did not start, or refused a workflow.
    """
    single = _sized(load_workflow("easyref_character"), material.settings)
    controlled = _sized(load_workflow("easyref_controlnet"), material.settings)
    canny = only_node(controlled, "Canny")
    controlled[_EDGES] = {"class_type": "PreviewImage", "inputs": {"images": [canny, 0]}}
    with (
        tempfile.TemporaryDirectory(prefix="easyref_demo_") as base,
        ComfyServer(comfyui, Path(base)) as server,
    ):
        _upload(server, material.references, _REFERENCES)
        others = [f"other_{name}" for name in _REFERENCES]
        _upload(server, material.others, others)
        server.upload(_CONTROL, material.control)

        def saved(graph: Graph) -> Image.Image:
            return server.pictures(server.run(graph), only_node(graph, "SaveImage"))[0]

        prompt_only = saved(without_easyref(single))
        easyref = saved(single)
        renamed = dict(zip(_REFERENCES, others, strict=True))
        other = saved(with_pictures(single, renamed))
        run = server.run(controlled)
        with_control = server.pictures(run, only_node(controlled, "SaveImage"))[0]
        edges = server.pictures(run, _EDGES)[0]
    version = comfyui_version(comfyui)
    return Pictures(prompt_only, easyref, other, with_control, edges, f"ComfyUI {version}")


def _sized(graph: Graph, settings: Settings) -> Graph:
    graph = use_demo_models(graph)
    graph = set_inputs(graph, "EmptyLatentImage", width=settings.side, height=settings.side)
    return set_inputs(graph, "KSampler", steps=settings.steps)


def _upload(server: ComfyServer, pictures: Sequence[Image.Image], names: Sequence[str]) -> None:
    for name, picture in zip(names, pictures, strict=True):
        server.upload(name, picture)
