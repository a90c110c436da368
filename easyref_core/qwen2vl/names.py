"""Names of Qwen2-VL's weights: one layout in the project, whatever library wrote the file.

transformers up to 4.51 wrote `visual.X` and `model.X`; newer ones `model.visual.X` and
`model.language_model.X`. The first is used here, as in Hugging Face's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..errors import EasyRefError
from ..untrusted import shown

Source = TypeVar("Source")

_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.lm_head.", "lm_head."),
)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LAYERS = "model.layers."
BLOCKS = "visual.blocks."


def canonical_name(name: str) -> str:
    """The name a body weight has in Hugging Face's original files."""
    for new, old in _PREFIXES:
        if name.startswith(new):
            return old + name[len(new) :]
    return name


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> name in the file.

    The word embedding and the output head are tied; where only one is in the file, it is the
    embedding. Rotary `inv_freq` buffers of old files are dropped.

    Raises:
        EasyRefError: two names for one weight.
    """
    canonical: dict[str, str] = {}
    for name in names:
        if name.endswith("inv_freq"):
            continue
        first = canonical.setdefault(canonical_name(name), name)
        if first != name:
            raise EasyRefError(
                f"{shown(first)} and {shown(name)} are two names of one weight of the MLLM. "
                "The file mixes the layouts of two versions of transformers; get it again."
            )
    head = canonical.pop(HEAD, None)
    if head is not None:
        canonical.setdefault(EMBEDDING, head)
    return canonical


def layer_number(name: str, prefix: str) -> int | None:
    """The number that follows a prefix in a weight's name; None where none does."""
    number = name[len(prefix) :].split(".", 1)[0] if name.startswith(prefix) else ""
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 10 else None


def layer_numbers(names: Iterable[str], prefix: str) -> set[int]:
    """The numbers of the layers that weights belong to."""
    return {number for n in names if (number := layer_number(n, prefix)) is not None}


def truncate(sources: Mapping[str, Source], layers: int) -> dict[str, Source]:
    """Only the first decoder `layers` of weights by canonical name, and all other weights."""
    return {
        name: source
        for name, source in sources.items()
        if (number := layer_number(name, LAYERS)) is None or number < layers
    }
