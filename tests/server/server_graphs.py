"""The shipped workflows on the demo models, small enough for a test, and their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from workshop.comfyui.comfy_client import ComfyClient
from workshop.demo.workflow import (
    EXAMPLE,
    Graph,
    load_workflow,
    only_node,
    set_inputs,
    use_demo_models,
    with_pictures,
    with_references,
)

REFERENCES = ("reference_1.png", "reference_2.png", "reference_3.png")
OTHERS = ("other_1.png", "other_2.png", "other_3.png")
FOURTH = "reference_4.png"
CONTROL = "control.png"
SIDE = 128
STEPS = 3


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def with_test_pictures(graph: Graph) -> Graph:
    """The same graph with pictures that the tests' server has."""
    groups = sum(n["class_type"] == "EasyRefReferences" for n in graph.values())
    files = {0: (), 1: (REFERENCES,), 2: (REFERENCES[:2], (REFERENCES[2], FOURTH))}[groups]
    return with_pictures(with_references(graph, *files), {EXAMPLE: CONTROL})


def small(name: str = "easyref_character", **sampler: Any) -> Graph:
    """A shipped workflow on the demo models, with few steps."""
    graph = with_test_pictures(use_demo_models(load_workflow(name)))
    return set_inputs(graph, "KSampler", **{"steps": STEPS, **sampler})


def other_references(graph: Graph) -> Graph:
    """The same graph with another character's pictures."""
    return with_pictures(graph, dict(zip(REFERENCES, OTHERS, strict=True)))


def pixels(server: ComfyClient, graph: Graph) -> np.ndarray[Any, Any]:
    """Run a graph and return its saved picture as an array, [H, W, 3]."""
    run = server.run(graph)
    (picture,) = server.pictures(run, only_node(graph, "SaveImage"))
    assert picture.format == "PNG"
    assert picture.mode == "RGB"
    return np.asarray(picture)
