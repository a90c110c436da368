"""What the demo starts from and what it makes, whichever program makes it."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from .drawing import FOX, MOUSE, draw_references, meadow
from .workflow import Graph, load_workflow, only_node

SIDE = 320
STEPS = 20


@dataclass(frozen=True)
class Settings:
    """How every picture of the demo is sampled: the shipped workflow's settings, made smaller."""

    prompt: str
    negative: str
    seed: int
    cfg: float
    control_strength: float
    steps: int = STEPS
    side: int = SIDE


@dataclass(frozen=True)
class Material:
    """The demo's inputs.

    Attributes:
        references: one character in pictures of different sizes.
        others: another character, likewise.
        control: a picture whose edges steer the composition.
    """

    references: list[Image.Image]
    others: list[Image.Image]
    control: Image.Image
    settings: Settings


@dataclass(frozen=True)
class Pictures:
    """The demo's results: same prompt, same seed, other conditioning.

    Attributes:
        edges: what the ControlNet saw.
        made_by: the program and its version.
    """

    prompt_only: Image.Image
    easyref: Image.Image
    others: Image.Image
    controlled: Image.Image
    edges: Image.Image
    made_by: str

    def named(self) -> dict[str, Image.Image]:
        """File name without ending -> picture."""
        return {
            "prompt_only": self.prompt_only,
            "easyref": self.easyref,
            "easyref_other_references": self.others,
            "easyref_controlnet": self.controlled,
            "edges": self.edges,
        }


def draw_material() -> Material:
    """Draw the inputs and read the settings from the shipped workflow."""
    graph = load_workflow("easyref_controlnet")
    return Material(
        draw_references(FOX),
        draw_references(MOUSE),
        meadow(FOX, 512, 512),
        settings_of(graph),
    )


def settings_of(graph: Graph) -> Settings:
    """The sampling settings of the shipped workflow with a ControlNet."""
    sampler = graph[only_node(graph, "KSampler")]["inputs"]
    control = graph[only_node(graph, "ControlNetApplyAdvanced")]["inputs"]
    texts = [n["inputs"]["text"] for n in graph.values() if n["class_type"] == "CLIPTextEncode"]
    return Settings(
        prompt=graph[only_node(graph, "PrimitiveStringMultiline")]["inputs"]["value"],
        negative=next(text for text in texts if isinstance(text, str)),
        seed=sampler["seed"],
        cfg=sampler["cfg"],
        control_strength=control["strength"],
    )
