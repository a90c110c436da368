"""Makes the templates' thumbnails by running each template on the demo models.

python -m workshop.templates.template_pictures     writes workflows/*.jpg
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from easyref_core.errors import EasyRefError

from ..comfyui.comfy_server import ComfyServer
from ..comfyui.find_comfyui import find_comfyui
from ..demo.references import read_rows
from ..demo.rows import Row, SamplingSettings
from ..demo.workflow import (
    EXAMPLE,
    WORKFLOWS,
    Graph,
    load_workflow,
    only_node,
    set_inputs,
    set_prompts,
    use_demo_models,
    with_pictures,
    with_references,
    without_nodes,
)
from .thumbnail import write_thumbnail


@dataclass(frozen=True)
class Scene:
    """What a template is shown with.

    Attributes:
        file: of the template and its picture, without the ending.
        references: (row, number of its picture), divided among the template's groups.
        prompt: the row whose prompt is used.
        outline: the row whose outline is the ControlNet's picture.
        inputs: node class -> inputs that replace the template's, which are meant for SDXL.
    """

    file: str
    title: str
    caption: str
    references: tuple[tuple[str, int], ...]
    prompt: str
    outline: str | None = None
    inputs: Mapping[str, Mapping[str, str | int]] = field(default_factory=dict)


def _of(row: str, count: int) -> tuple[tuple[str, int], ...]:
    return tuple((row, number) for number in range(1, count + 1))


SCENES = (
    Scene(
        "easyref_try",
        "Try EasyRef",
        "models and pictures that come with it: click Run",
        _of("square", 4),
        "square",
        inputs={"KSampler": {"seed": 2}},
    ),
    Scene(
        "easyref_quick",
        "EasyRef: quick start",
        "drop pictures, write a prompt, run",
        _of("star", 2),
        "star",
    ),
    Scene(
        "easyref_character",
        "EasyRef: one character",
        "any scene, from several reference pictures",
        _of("flower", 3),
        "flower",
    ),
    Scene(
        "easyref_style",
        "EasyRef: one style",
        "any subject, from several reference pictures",
        _of("checks", 3),
        "checks",
    ),
    Scene(
        "easyref_controlnet",
        "EasyRef with a ControlNet",
        "the character from pictures, the pose from lines",
        _of("square", 3),
        "square",
        outline="square",
    ),
    Scene(
        "easyref_two_people",
        "EasyRef: two people",
        "each has references and a region of the picture",
        (*_of("flower", 2), *_of("star", 2)),
        "drop_with_friends",
        # The small model draws one figure in a square.
        inputs={"EmptyLatentImage": {"width": 256, "height": 128}, "KSampler": {"seed": 3}},
    ),
    Scene(
        "easyref_curves_and_layers",
        "EasyRef: curve and layers",
        "when and in which layers the references act",
        _of("checks", 3),
        "checks",
        # The small UNet keeps a style in its finest layers, not where SDXL does.
        inputs={"EasyRefLayerWeights": {"profile": "fine detail"}},
    ),
    Scene(
        "easyref_stages",
        "EasyRef: stages",
        "what the references mean; then what they look like, too",
        _of("flower", 2),
        "flower",
    ),
    Scene(
        "easyref_tokens",
        "EasyRef: saved tokens",
        "encode the references once, use them again and again",
        _of("star", 3),
        "star",
    ),
    Scene(
        "easyref_with_lora",
        "EasyRef beside a LoRA",
        "the LoRA's look, the references' character",
        _of("square", 3),
        "flower",
    ),
    Scene(
        "easyref_score",
        "EasyRef: which weight?",
        "likeness to references and prompt, in numbers",
        _of("flower", 2),
        "square",
    ),
    Scene(
        "easyref_subgraph",
        "EasyRef as one node",
        "encode and apply in a subgraph of your own",
        _of("square", 2),
        "square",
    ),
)


def make_result(
    server: ComfyServer, scene: Scene, rows: Mapping[str, Row], settings: SamplingSettings
) -> Image.Image:
    """Run a scene's workflow on the demo models, with its references."""
    names = []
    for place, (row, number) in enumerate(scene.references, 1):
        picture = rows[row].references[number - 1]
        names.append(server.upload(f"reference_{place}.png", picture))
    graph = use_demo_models(load_workflow(scene.file))
    # None where the graph's own pictures are the references.
    groups = sum(node["class_type"] == "EasyRefReferences" for node in graph.values())
    size = len(names) // max(groups, 1)
    graph = with_references(graph, *(names[n * size : (n + 1) * size] for n in range(groups)))
    graph = set_prompts(graph, rows[scene.prompt].prompt, settings.negative)
    graph = set_inputs(
        graph, "KSampler", seed=settings.seed, steps=settings.steps, cfg=settings.cfg
    )
    for node_class, values in scene.inputs.items():
        graph = set_inputs(graph, node_class, **values)
    if scene.outline is not None:
        outline = server.upload("outline.png", rows[scene.outline].outline)
        graph = with_pictures(graph, {EXAMPLE: outline})
        graph = without_nodes(graph, "Canny", "image")  # the outline is drawn already
        graph = set_inputs(graph, "ControlNetApplyAdvanced", strength=settings.control_strength)
    if any(node["class_type"] == "EasyRefSaveTokens" for node in graph.values()):
        graph = _with_saved_tokens(server, graph)
    return server.pictures(server.run(graph), only_node(graph, "SaveImage"))[0]


def _with_saved_tokens(server: ComfyServer, graph: Graph) -> Graph:
    """The same graph with the file chosen that a first run saves."""
    (shown,) = server.run(graph).outputs[only_node(graph, "EasyRefSaveTokens")]["tokens"]
    return set_inputs(graph, "EasyRefLoadTokens", file=f"{shown['filename']} [{shown['type']}]")


def write_pictures(comfyui: Path, folder: Path = WORKFLOWS) -> list[Path]:
    """Run all scenes and write their thumbnails.

    Raises:
        EasyRefError: a shipped picture is missing, the server did not start, or a run failed.
    """
    rows = {row.name: row for row in read_rows()}
    written = []
    with (
        tempfile.TemporaryDirectory(prefix="easyref_templates_") as base,
        ComfyServer(comfyui, Path(base)) as server,
    ):
        for scene in SCENES:
            shown = [rows[row].references[number - 1] for row, number in scene.references]
            if scene.outline is not None:
                shown.append(rows[scene.outline].outline)
            result = make_result(server, scene, rows, SamplingSettings())
            target = folder / f"{scene.file}.jpg"
            written.append(write_thumbnail(shown, result, scene.title, scene.caption, target))
    return written


def main() -> int:
    comfyui = find_comfyui()
    if comfyui is None:
        print("The templates' pictures need ComfyUI: set COMFYUI_PATH.", file=sys.stderr)
        return 1
    try:
        for path in write_pictures(comfyui):
            print(f"{path} ({path.stat().st_size // 1000} kB)")
    except EasyRefError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
