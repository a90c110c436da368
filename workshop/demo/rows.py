"""What the demo starts from and what it makes, whichever program makes it.

A program (`comfy_backend`, `diffusers_backend`) has one entry, `make_pictures`: it takes a
`Material` and returns `Pictures`, one `RowPictures` for each `Row` in the same order. For a row it
makes four pictures from the same noise, seed `settings.seed`, of `settings.side` pixels:

    prompt_only   the base model alone: no adapter, no LoRA, the row's prompt
    easyref       the row's references and prompt, read together (aggregation "easyref")
    controlled    the same tokens; the ControlNet sees the row's outline, as it is, no edge finder
    averaged      each reference read alone, tokens averaged (aggregation "average")

References are read at the size that the adapter's file names. Prompt and negative prompt are
`row.prompt` and `settings.negative`, and the MLLM reads `row.prompt`, too. The shipped rows come
from `references.read_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Settings:
    """How every picture of the demo is sampled (DDIM).

    Attributes:
        negative: empty, as the small base model knows the words of scenes and characters only.
        side: of the square pictures, in pixels.
    """

    negative: str = ""
    seed: int = 1
    cfg: float = 5.0
    control_strength: float = 1.0
    steps: int = 20
    side: int = 128


@dataclass(frozen=True, eq=False)
class Row:
    """One group of references and what is made of it.

    Attributes:
        name: short, fit for a folder.
        kind: "identity", "crowded" (a friend beside the character) or "style".
        prompt: the scene, or in style groups the shape; never what the references share.
        references: RGB.
        outline: white lines on black, `Settings.side` pixels or close to it.
        facts: attribute -> value that a good result shows, the prompt's part included.
    """

    name: str
    kind: str
    prompt: str
    references: tuple[Image.Image, ...]
    outline: Image.Image
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Material:
    """The demo's inputs."""

    rows: tuple[Row, ...]
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, eq=False)
class RowPictures:
    """A row's results: same prompt, same seed, other conditioning."""

    prompt_only: Image.Image
    easyref: Image.Image
    controlled: Image.Image
    averaged: Image.Image

    def named(self) -> dict[str, Image.Image]:
        """Name, as files are called, -> picture."""
        return {
            "prompt_only": self.prompt_only,
            "easyref": self.easyref,
            "easyref_controlnet": self.controlled,
            "average": self.averaged,
        }


@dataclass(frozen=True)
class Pictures:
    """The demo's results.

    Attributes:
        rows: one for each row of the material.
        made_by: the program and its version.
    """

    rows: tuple[RowPictures, ...]
    made_by: str
