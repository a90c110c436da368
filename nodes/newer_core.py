"""What nodes tell newer ComfyUIs beside what the oldest that is supported understands."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

_ALIASES = "search_aliases"
_HAS_ALIASES = _ALIASES in {field.name for field in fields(io.Schema)}  # from 0.11 on

# An input that is folded away until it is asked for, from 0.10 on.
ADVANCED: dict[str, Any] = (
    {"advanced": True} if "advanced" in inspect.signature(io.Float.Input).parameters else {}
)


def found_by(*words: str) -> dict[str, Any]:
    """Words that find a node in the search beside its name, as arguments of its schema."""
    return {_ALIASES: list(words)} if _HAS_ALIASES else {}
