"""The methods that are compared: what each one makes of references and a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..trials import Trial

_TOKENS = frozenset({"weight", "references", "insert_before", "image_size", "adapter"})
_COMBINED = _TOKENS | {"identity", "stages"}
_EASYREF = _COMBINED | {"aggregation"}
_OTHERS = frozenset({"weight", "references"})

USES: dict[str, frozenset[str]] = {
    "easyref": _EASYREF,
    "average": _COMBINED,
    "concatenate": _COMBINED,
    "ip-adapter": _OTHERS,
    "lora": _OTHERS,
    "lora-other": _OTHERS,
    "none": frozenset(),
    "easyref-other": _EASYREF,
}
"""Method -> names of the `Variant` fields, beside steps and guidance, that change its result."""

METHODS = tuple(USES)


@dataclass(frozen=True, eq=False)
class Generated:
    """The outcome of a trial.

    Attributes:
        image: None where it failed.
        seconds: what took how long, such as {"encode": 0.4, "sample": 2.1, "decode": 0.2}.
        error: why there is no image, one sentence; empty if there is.
    """

    image: Image.Image | None
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""


class Method(Protocol):
    """One method, ready to be used by one process.

    Attributes:
        name: one of `METHODS`.
    """

    name: str

    def identity(self) -> dict[str, Any]:
        """What its images depend on beside the trials, as plain JSON: files with their sizes and
        checksums, settings of training. Compared when a run is resumed."""
        ...

    def generate(self, trials: Sequence[Trial], work: Path) -> list[Generated]:
        """Generate one batch; all trials are of one variant.

        Args:
            work: a folder of the run, for what should not be computed twice (tokens, LoRAs);
                processes share it.

        Returns:
            One for each trial, in order. An image that failed for a reason of its own (memory,
            values that are not numbers, an unreadable reference) is marked; EasyRefError is raised
            only for what concerns all trials.
        """
        ...

    def close(self) -> None:
        """Free what it holds, so that the next method finds the pipeline as it was."""
        ...
