"""Lack of memory as ComfyUI knows it."""

from __future__ import annotations

import comfy.model_management as mm

from ...easyref_core import out_of_memory


def lack_of_memory(error: BaseException) -> str | None:
    """As the core's `lack_of_memory`, for the host's own errors too. Where a GPU reported it, what
    it left behind is cleared, or the next thing asked of it would fail."""
    said = out_of_memory.lack_of_memory(error)
    # Older cores ask for the class themselves, which is Exception where PyTorch has none.
    is_oom = getattr(mm, "is_oom", None)
    if is_oom is not None and mm.OOM_EXCEPTION is not Exception and is_oom(error):
        return said or out_of_memory.first_line(error)
    return said
