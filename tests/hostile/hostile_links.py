"""Values that another pack's node may link to an input, whose ranges ComfyUI does not check."""

from __future__ import annotations

from corpus import EITHER, USED, Case, Way
from homes import Home

NUMBERS = ("nan", "inf", "-inf", "1e30", "10**400", "true", "text", "list", "object", "tensor")


def nothing(home: Home) -> None:
    """The home as it is."""


def linked(graph: str, name: str, value: str, result: str = "refused") -> Case:
    """A value by link to `node__input` of a graph."""
    way = Way("comfy_entry_points.graph", more={"name": graph, name: {"link": value}}, name="link")
    return Case(f"{value} as {name.replace('__', '.')}", nothing, (way,), result)


CASES = (
    *(
        linked("saved", f"apply__{name}", value)
        for name in ("weight", "start_percent", "end_percent", "lora_strength")
        for value in NUMBERS
    ),
    *(
        linked("pictures", "references__weight", value)
        for value in ("nan", "inf", "-inf", "10**400", "text", "object")
    ),
    *(
        linked("whole", f"tokens__{name}", value)
        for name in ("image_size", "prompt", "aggregation")
        for value in ("nan", "1e30", "10**400", "true", "list", "object", "tensor")
    ),
    *(
        linked("saved", f"apply__{name}", value)
        for name in ("mask", "layer_weights", "curve", "regions", "normalise", "tokens", "easyref")
        for value in ("nan", "text", "list", "object", "nan tensor")
    ),
    *(
        linked("whole", "tokens__mllm_layers", value)
        for value in ("nan", "text", "list", "object", "tensor")
    ),
    *(
        linked("pictures", f"references__{name}", value)
        for name in ("previous", "gallery")
        for value in ("nan", "list", "object", "tensor")
    ),
    *(
        linked("whole", "tokens__images", value)
        for value in ("nan", "text", "object", "nan tensor")
    ),
    *(
        linked("whole", f"loader__{name}", value)
        for name in ("adapter", "mllm", "precision")
        for value in ("nan", "list", "object", "text")
    ),
    *(linked("saved", "tokens__file", value) for value in ("nan", "list", "object", "text")),
    linked("saved", "apply__curve", "none", USED),
    linked("saved", "apply__mask", "none", USED),
    linked("saved", "apply__weight", "none", EITHER),
)
