"""Out-of-memory errors as ComfyUI recognises them."""

from __future__ import annotations

import comfy.model_management as mm

from ...easyref_core import out_of_memory


def lack_of_memory(error: BaseException) -> str | None:
    """As the core's `lack_of_memory`, for the host's own errors too. ComfyUI's check also clears
    the error that a GPU reported, or its next operation would fail."""
    reason = out_of_memory.lack_of_memory(error)
    # Older cores only have the class, which is Exception if PyTorch has none.
    is_oom = getattr(mm, "is_oom", None)
    if is_oom is not None and mm.OOM_EXCEPTION is not Exception and is_oom(error):
        return reason or out_of_memory.first_line(error)
    return reason
