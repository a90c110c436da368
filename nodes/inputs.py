"""Inputs that several nodes have; their ranges are the same wherever they stand."""

from __future__ import annotations

from comfy_api.latest import io

_PROMPT = "What the picture shall show; usually the same text as the positive prompt. May be empty."


def images_input() -> io.Image.Input:
    return io.Image.Input(
        "images",
        optional=True,
        tooltip="Reference pictures as one batch. They come before those of references.",
    )


def prompt_input(tooltip: str = _PROMPT) -> io.String.Input:
    return io.String.Input(
        "prompt", multiline=True, dynamic_prompts=True, default="", tooltip=tooltip
    )


def image_size_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("image_size", default=0, min=0, max=1344, step=28, tooltip=tooltip)


def weight_input(tooltip: str, name: str = "weight", default: float = 1.0) -> io.Float.Input:
    """A factor: 1 as trained, below 0 the other way."""
    return io.Float.Input(name, default=default, min=-1.0, max=3.0, step=0.05, tooltip=tooltip)
