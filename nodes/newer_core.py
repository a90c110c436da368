"""Schema options that only newer ComfyUIs have."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

_ALIASES = "search_aliases"
_HAS_ALIASES = _ALIASES in {field.name for field in fields(io.Schema)}  # from 0.11 on

# Hides an input among the advanced ones, from 0.10 on.
ADVANCED: dict[str, Any] = (
    {"advanced": True} if "advanced" in inspect.signature(io.Float.Input).parameters else {}
)


def found_by(*words: str) -> dict[str, Any]:
    """More words that the search finds a node by, as arguments of its schema.

    Args:
        words: one, or several separated by commas.
    """
    return {_ALIASES: ", ".join(words).split(", ")} if _HAS_ALIASES else {}
