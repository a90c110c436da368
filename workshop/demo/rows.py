"""The demo's inputs and results, independent of the program that samples the images.

A program (`comfy_backend`, `diffusers_backend`) has one entry, `make_images`: it takes a
`DemoInputs` and returns `DemoImages`, one `RowImages` for each `Row` in the same order. For a row
it samples five or six images from the same noise, seed `settings.seed`, of `settings.side` pixels:

    prompt_only   the base model alone: no adapter, no LoRA, the row's prompt
    described     the same with a prompt that names what the references share, too
    easyref       references and prompt encoded together (aggregation "easyref")
    identity      the same tokens, and EasyRef Identity with the same references, if the adapter has
                  an identity LoRA
    controlled    the same tokens, and a ControlNet with the row's outline as it is
    averaged      each reference encoded alone, tokens averaged (aggregation "average")

References are encoded at the image size that the adapter's file names. Prompt and negative prompt
are `row.prompt` and `settings.negative`, and the MLLM gets `row.prompt`, too. The shipped rows come
from `references.read_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from .dataset.groups import full_caption


@dataclass(frozen=True)
class SamplingSettings:
    """How every image of the demo is sampled (DDIM).

    Attributes:
        negative: empty, as the small base model knows the words of scenes and characters only.
        identity_weight, identity_start: of EasyRef Identity, which acts from there to the end.
        side: of the square images, in pixels.
    """

    negative: str = ""
    seed: int = 1
    cfg: float = 3.0
    control_strength: float = 1.0
    identity_weight: float = 1.0
    identity_start: float = 0.14
    steps: int = 20
    side: int = 128


@dataclass(frozen=True, eq=False)
class Row:
    """One group of references, with a prompt.

    Attributes:
        name: short, fit for a folder.
        kind: "identity", "crowded" (a friend beside the character) or "style".
        prompt: the scene, or in style groups the shape; never what the references share.
        references: RGB.
        outline: white lines on black, `SamplingSettings.side` pixels or close to it.
        facts: attribute -> value that a good result shows, the prompt's part included.
    """

    name: str
    kind: str
    prompt: str
    references: tuple[Image.Image, ...]
    outline: Image.Image
    facts: Mapping[str, str]

    @property
    def description(self) -> str:
        """The prompt, with what the references share."""
        return full_caption(self.prompt, self.facts)


@dataclass(frozen=True)
class DemoInputs:
    """The demo's rows, and how to sample their images."""

    rows: tuple[Row, ...]
    settings: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(frozen=True, eq=False)
class RowImages:
    """A row's results: same prompt, same seed, different conditioning."""

    prompt_only: Image.Image
    described: Image.Image
    easyref: Image.Image
    controlled: Image.Image
    averaged: Image.Image
    identity: Image.Image | None = None

    def named(self) -> dict[str, Image.Image]:
        """File name without extension -> image."""
        results = {
            "prompt_only": self.prompt_only,
            "described": self.described,
            "easyref": self.easyref,
            "easyref_controlnet": self.controlled,
            "average": self.averaged,
        }
        return results if self.identity is None else results | {"identity": self.identity}


@dataclass(frozen=True)
class DemoImages:
    """The demo's results.

    Attributes:
        rows: one for each row of the inputs.
        made_by: the program and its version.
    """

    rows: tuple[RowImages, ...]
    made_by: str
