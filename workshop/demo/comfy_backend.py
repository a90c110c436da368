"""The demo's images, sampled by a real ComfyUI server with the shipped workflows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.demo_set import shipped_set

from ..comfyui.comfy_server import ComfyServer
from ..comfyui.find_comfyui import comfyui_version
from .rows import DemoImages, DemoInputs, Row, RowImages, SamplingSettings
from .stored_weights import ADAPTER
from .workflow import (
    EXAMPLE,
    Graph,
    load_workflow,
    only_node,
    set_inputs,
    set_prompts,
    use_demo_models,
    with_identity,
    with_pictures,
    with_references,
    without_easyref,
    without_nodes,
)


def make_images(comfyui: Path, inputs: DemoInputs) -> DemoImages:
    """Start a server, run the workflows on the demo models, and stop it.

    Raises:
        ComfyUIError: the server did not start, or refused a workflow.
    """
    with (
        tempfile.TemporaryDirectory(prefix="easyref_demo_") as base,
        ComfyServer(comfyui, Path(base)) as server,
    ):
        adapter = load_checkpoint(shipped_set() / ADAPTER)
        has_identity = bool(adapter.identity_lora)
        rows = tuple(_make_row(server, row, inputs.settings, has_identity) for row in inputs.rows)
    return DemoImages(rows, f"ComfyUI {comfyui_version(comfyui)}")


def _make_row(
    server: ComfyServer, row: Row, settings: SamplingSettings, has_identity: bool
) -> RowImages:
    names = [f"{row.name}_{number}.png" for number in range(1, len(row.references) + 1)]
    for name, picture in zip(names, row.references, strict=True):
        server.upload(name, picture)
    outline = server.upload(f"{row.name}_outline.png", row.outline)

    single = _prepared("easyref_character", names, row, settings)
    controlled = _prepared("easyref_controlnet", names, row, settings)
    # The row has its outline already.
    controlled = without_nodes(controlled, "Canny", "image")
    controlled = set_inputs(
        controlled, "ControlNetApplyAdvanced", strength=settings.control_strength
    )
    controlled = with_pictures(controlled, {EXAMPLE: outline})

    def saved(graph: Graph) -> Image.Image:
        return server.pictures(server.run(graph), only_node(graph, "SaveImage"))[0]

    return RowImages(
        prompt_only=saved(without_easyref(single)),
        described=saved(set_prompts(without_easyref(single), row.description, settings.negative)),
        easyref=saved(single),
        controlled=saved(controlled),
        averaged=saved(set_inputs(single, "EasyRefEncode", aggregation="average")),
        identity=saved(_with_identity(single, settings)) if has_identity else None,
    )


def _with_identity(graph: Graph, settings: SamplingSettings) -> Graph:
    return with_identity(graph, settings.identity_weight, settings.identity_start)


def _prepared(workflow: str, references: list[str], row: Row, settings: SamplingSettings) -> Graph:
    """A shipped workflow with the demo's models, references, prompts and settings."""
    graph = use_demo_models(load_workflow(workflow))
    graph = with_references(graph, references)
    graph = set_prompts(graph, row.prompt, settings.negative)
    graph = set_inputs(graph, "EmptyLatentImage", width=settings.side, height=settings.side)
    sampling = {"seed": settings.seed, "steps": settings.steps, "cfg": settings.cfg}
    # The timesteps of `DemoModels`, so that both backends give the same images.
    return set_inputs(graph, "KSampler", scheduler="ddim_uniform", **sampling)
