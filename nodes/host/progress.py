"""Progress in the graph."""

from __future__ import annotations

import sys
from collections.abc import Callable

import comfy.model_management as mm
import comfy.utils


def progress_bar() -> Callable[[int, int], None]:
    """Shows (done, total) in the graph; raises ComfyUI's exception when the user interrupts."""
    bar: comfy.utils.ProgressBar | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        mm.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return report


def show_text(text: str, node: str | None) -> None:
    """Show a line at a node of the graph, where there is a page.

    Args:
        node: its id; None shows nothing.
    """
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if node is not None and instance is not None:
        instance.send_progress_text(text, node)
